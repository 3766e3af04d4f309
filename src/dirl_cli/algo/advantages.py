"""What an answer is worth beside the others to its problem."""

from collections.abc import Callable

import torch
from torch import Tensor

Advantage = Callable[[Tensor], Tensor]
"""From the rewards of a group (G,) to advantages (G,)."""


def normalised(rewards: Tensor) -> Tensor:
    """(R - mean) / std, the population's; zero where all are equal (GRPO)."""
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std(correction=0)


def mean_only(rewards: Tensor) -> Tensor:
    """R - mean (Dr. GRPO, arXiv 2503.20783)."""
    return rewards - rewards.mean()


def leave_one_out(rewards: Tensor) -> Tensor:
    """R - the mean of the others (RLOO, arXiv 2402.14740)."""
    n = len(rewards)
    return (rewards - rewards.mean()) * (n / (n - 1)) if n > 1 else torch.zeros_like(rewards)


ADVANTAGES: dict[str, Advantage] = {f.__name__: f for f in (normalised, mean_only, leave_one_out)}
