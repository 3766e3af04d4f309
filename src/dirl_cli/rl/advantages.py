"""What an answer is worth beside the others to its problem."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LEAST_STD = 1e-4  # TRL adds as much to every spread; a floor leaves rewards of 0 and 1 exactly as they are

Advantage = Callable[[Tensor], Tensor]
"""From the rewards of a group (G,) to advantages (G,)."""


def normalised(rewards: Tensor) -> Tensor:
    """(R - mean) / std, the population's; zero where all are equal (GRPO).

    A spread below 1e-4 counts as that, so that rewards which differ by rounding are not blown up to ±1.
    """
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std(correction=0).clamp(min=LEAST_STD)


def mean_only(rewards: Tensor) -> Tensor:
    """R - mean (Dr. GRPO, arXiv 2503.20783)."""
    return rewards - rewards.mean()


def leave_one_out(rewards: Tensor) -> Tensor:
    """R - the mean of the others (RLOO, arXiv 2402.14740)."""
    n = len(rewards)
    return (rewards - rewards.mean()) * (n / (n - 1)) if n > 1 else torch.zeros_like(rewards)


ADVANTAGES: dict[str, Advantage] = {f.__name__: f for f in (normalised, mean_only, leave_one_out)}


FILTERS = ("accuracy", "reward", "none")
ROUNDING = 1e-6  # rewards nearer to each other than this are the same


def has_signal(rewards: Sequence[float], correct: Sequence[bool], rule: str) -> bool:
    """Whether a group's answers differ: by `accuracy` some are right and some wrong, by `reward` it is not constant.

    rule: one of FILTERS; `none` keeps every group.
    """
    if rule == "accuracy":
        return any(correct) and not all(correct)
    if rule == "reward":
        return max(rewards) - min(rewards) > ROUNDING
    return True
