"""The built-in rewards, each a formula over one answer; those over all answers to a problem are in ranking.py.

A pair of values is what the shortest and the longest answer get, or the slowest and the fastest; `between` joins them.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import cos, pi
from typing import Any, Self, get_type_hints

from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.ranges import Count, Finite, require
from dirl_cli.reward.boxed import last_boxed
from dirl_cli.reward.functions import find_function, is_import_path
from dirl_cli.reward.process import RevealedBlock
from dirl_cli.reward.ranking import RANKINGS, Ranking
from dirl_cli.types import Problem, Trajectory


@dataclass(frozen=True)
class Answer:
    """One completion of a problem, as a reward sees it.

    completion: the text up to the stop token. length: its tokens, the stop token not counted.
    truncated: it ran into the length limit. verified: its final answer is right, truncated or not.
    credit: what its problem's verifier gives, from 0 to 1, which is verified.
    tokens_per_step: tokens revealed per denoising forward, from 1 to block_size.
    blocks: how it was filled, in order; only where process rewards are computed.
    """

    problem: Problem
    completion: str
    length: int
    truncated: bool
    tokens_per_step: float
    max_new_tokens: int
    block_size: int
    verified: bool = False
    credit: float = 0.0
    blocks: tuple[RevealedBlock, ...] = ()

    @classmethod
    def of(
        cls,
        problem: Problem,
        trajectory: Trajectory,
        completion: str,
        max_new_tokens: int,
        block_size: int,
        blocks: tuple[RevealedBlock, ...] = (),
    ) -> Self:
        """The answer that a trajectory holds, not graded yet; `completion` is the text of its completion_ids."""
        return cls(
            problem=problem,
            completion=completion,
            length=len(trajectory.completion_ids),
            truncated=trajectory.stop_reason == "length",
            tokens_per_step=trajectory.num_revealed / trajectory.denoise_forwards,
            max_new_tokens=max_new_tokens,
            block_size=block_size,
            blocks=blocks,
        )

    @property
    def correct(self) -> bool:
        """Verified and complete: the accuracy of every formula, and what `correct` means in every file of a run."""
        return self.verified and not self.truncated

    # What rewards written for earlier versions read.

    @property
    def right(self) -> bool:
        """The former name of `correct`."""
        return self.correct

    @property
    def tokens(self) -> int:
        """The former name of `length`."""
        return self.length


Reward = Callable[..., float]
"""From an answer, and options by keyword where it has any, to a finite number; a function of these alone."""

Ends = tuple[Finite, Finite]


def between(ends: Ends, t: float, end: float) -> float:
    """From ends[0] at t = 0 to ends[1] at t = end and beyond, along half a cosine: a + (b - a)(1 - cos(πt/end))/2."""
    first, last = ends
    progress = min(t / end, 1.0) if end else 0.0
    return first + (last - first) * (1 - cos(pi * progress)) / 2


def steps_ahead(answer: Answer) -> float:
    """s = clip(tokens per denoising step - 1, 0, block_size - 1)."""
    return min(max(answer.tokens_per_step - 1, 0.0), answer.block_size - 1)


def accuracy(answer: Answer) -> float:
    """1 if correct, else 0; a truncated answer is never correct."""
    return float(answer.correct)


def credit(answer: Answer) -> float:
    """What the verifier gives: 1 if correct, between 0 and 1 if partly so, where it tells; 0 if truncated."""
    return 0.0 if answer.truncated else answer.credit


def binary(answer: Answer) -> float:
    """1 if correct, else -1."""
    return 1.0 if answer.correct else -1.0


def boxed(answer: Answer, *, value: Finite = 0.1) -> float:
    r"""`value` if there is a closed `\boxed{}`, else 0."""
    return value if last_boxed(answer.completion) is not None else 0.0


def format(answer: Answer, *, opened: bool = False) -> float:
    """1 if the completion is `<think>…</think>…`, each tag once and something after them, else 0.

    opened: the prompt already ends in `<think>`, so that the completion does not begin with it.
    """
    text = answer.completion.strip()
    if opened:
        text = "<think>" + text
    once = text.count("<think>") == text.count("</think>") == 1
    return float(once and text.startswith("<think>") and not text.endswith("</think>"))


def cosine(
    answer: Answer,
    *,
    right: Ends = (1.0, 0.5),
    wrong: Ends = (-0.5, 0.0),
    truncated: Finite = -0.5,
) -> float:
    """Right: 1 → 0.5, wrong: -0.5 → 0 as the length goes 0 → max_new_tokens; truncated: -0.5 (arXiv 2502.03373)."""
    if answer.truncated:
        return truncated
    ends = right if answer.correct else wrong
    return between(ends, answer.length, answer.max_new_tokens)


def repetition(answer: Answer, *, n: Count = 3) -> float:
    """-(1 - distinct/all n-grams of words), in any case of letters; 0 for fewer than n words."""
    words = answer.completion.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0.0
    return len(set(grams)) / len(grams) - 1


def soft_overlong(answer: Answer, *, cache: Count) -> float:
    """min(-(length - (max_new_tokens - cache)) / cache, 0): a ramp over the last `cache` tokens (DAPO, eq. 13)."""
    return min((answer.max_new_tokens - cache - answer.length) / cache, 0.0)


def speed(answer: Answer, *, right: Ends = (0.5, 1.0), wrong: Ends = (0.0, -0.5)) -> float:
    """Right: 0.5 → 1, wrong: 0 → -0.5 as a step reveals 1 → block_size tokens."""
    ends = right if answer.correct else wrong
    return between(ends, steps_ahead(answer), answer.block_size - 1)


def speed_penalty(answer: Answer, *, right: Finite = 0.5, wrong: Ends = (0.0, -0.5)) -> float:
    """Right: 0.5 at any speed; wrong: as `speed`, so that only haste which costs the answer is punished."""
    return speed(answer, right=(right, right), wrong=wrong)


def length(answer: Answer) -> float:
    """λ = 0.5 - length/max_new_tokens if right, else min(λ, 0).

    Kimi k1.5's length reward (arXiv 2501.12599, §2.3.3) with 0 and max_new_tokens in place of the shortest and
    longest answer of the group, so that it is a function of one answer.
    """
    share = 0.5 - min(answer.length / answer.max_new_tokens, 1.0)
    if answer.correct:
        return share
    return min(share, 0.0)


FORMULAS = (accuracy, credit, binary, boxed, format, cosine, repetition, soft_overlong, speed, speed_penalty, length)
BUILT_IN: dict[str, Reward] = {formula.__name__: formula for formula in FORMULAS}


@cache
def find_reward(name: str) -> Reward | Ranking:
    """The reward called `name`: built in, `my_module.my_reward`, or `rewards.py:my_reward`.

    Raises DirlError where there is no such reward, or where its code cannot be loaded.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name in RANKINGS:
        return RANKINGS[name]

    # An own reward is FILE:FUNCTION or MODULE.FUNCTION; a name with neither can only be a built-in one, mistyped.
    if not is_import_path(name):
        raise DirlError(
            f"no reward is called {name}: {built_in_hint(name)}"
            "; one of your own is my_module.my_reward or rewards.py:my_reward"
        )
    return find_function(name, "reward")


def built_in_hint(name: str) -> str:
    """The built-in reward that a mistyped name is nearest to, and all of them."""
    built_in = [*BUILT_IN, *RANKINGS]
    hint = did_you_mean(name, built_in)
    names = ", ".join(built_in)
    if names in hint:
        return hint
    return f"{hint} There are {names}"


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises DirlError where the reward called `name` cannot be called with these options."""
    reward = find_reward(name)
    try:
        inspect.signature(reward).bind(None, **options)
    except TypeError as error:
        raise DirlError(f"reward.options.{name} does not fit the reward {name}: {error}") from error
    # Only of our own do we know that the annotations say which values they take.
    if name in (*BUILT_IN, *RANKINGS):
        types = get_type_hints(reward, include_extras=True)
        for option, value in options.items():
            require(value, types[option], f"reward.options.{name}.{option}")
