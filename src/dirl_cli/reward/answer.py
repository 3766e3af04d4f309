"""What a reward may look at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from dirl_cli.types import Problem, Trajectory


@dataclass(frozen=True)
class Answer:
    """One completion of a problem.

    completion: the text up to the stop token. tokens: how many it has.
    truncated: it ran into the length limit. correct: its last box was verified, truncated or not.
    tokens_per_step: tokens revealed per denoising forward, from 1 to block_size.
    """

    problem: Problem
    completion: str
    tokens: int
    truncated: bool
    tokens_per_step: float
    max_new_tokens: int
    block_size: int
    correct: bool = False

    @classmethod
    def of(
        cls, problem: Problem, trajectory: Trajectory, completion: str, max_new_tokens: int, block_size: int
    ) -> Self:
        """The answer that a trajectory holds, not graded yet; `completion` is the text of its completion_ids."""
        return cls(
            problem=problem,
            completion=completion,
            tokens=len(trajectory.completion_ids),
            truncated=trajectory.stop_reason == "length",
            tokens_per_step=len(trajectory.token_ids) / trajectory.denoise_forwards,
            max_new_tokens=max_new_tokens,
            block_size=block_size,
        )

    @property
    def right(self) -> bool:
        """Correct and complete: the accuracy of every formula."""
        return self.correct and not self.truncated


Reward = Callable[..., float]
"""From an answer, and options by keyword where it has any, to a finite number; a function of these alone."""
