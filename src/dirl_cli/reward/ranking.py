"""Rewards that compare an answer with the others to its problem: they are computed once its group is complete."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from dirl_cli.ranges import OneOf


@dataclass(frozen=True)
class Contender:
    """What of an answer is compared: whether it is correct, its tokens up to the stop token, its denoising forwards.

    is_hinted: whether some of its tokens stood there from the start, so that its forwards say nothing of its speed.
    """

    correct: bool
    tokens: int
    forwards: int
    is_hinted: bool = False


Ranking = Callable[..., list[float]]
"""From the answers to a problem, and options by keyword where it has any, to a number for each."""

MEASURES = ("tokens_per_forward", "forwards")


def speed_rank(
    answers: Sequence[Contender], *, measure: Annotated[str, OneOf(*MEASURES)] = "tokens_per_forward"
) -> list[float]:
    """Right: the share of the other right answers to the problem that are slower, equal ones by half; wrong: 0.

    A group that is all right so has an order, and haste alone earns nothing. An only right answer gets 0.5, and so does
    one with hints, which is compared with no other.
    measure: of two answers the one is faster that has more tokens per denoising forward, or that took fewer `forwards`,
    as a shorter one may.
    """
    speeds = [speed_of(answer, measure) for answer in answers]
    right = [speed for speed, one in zip(speeds, answers, strict=True) if one.correct and not one.is_hinted]
    ranks = []
    for speed, answer in zip(speeds, answers, strict=True):
        if not answer.correct:
            ranks.append(0.0)
        elif answer.is_hinted or len(right) == 1:
            ranks.append(0.5)
        else:
            slower = sum(other < speed for other in right)
            equal = sum(other == speed for other in right) - 1  # besides itself
            ranks.append((slower + equal / 2) / (len(right) - 1))
    return ranks


def speed_of(answer: Contender, measure: str) -> float:
    """A number that is the larger the faster an answer came."""
    return -answer.forwards if measure == "forwards" else answer.tokens / answer.forwards


RANKINGS: dict[str, Ranking] = {speed_rank.__name__: speed_rank}
