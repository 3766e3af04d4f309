"""How long a run will take on this machine's CPU: what it computes against what a CPU does, before it starts."""

import time
from dataclasses import dataclass

import torch

from dirl_cli.plan.architecture import Architecture
from dirl_cli.plan.memory import MicroBatch

# Of a large matrix product's speed, in a step with all that is not one. On one thread of an AMD EPYC fine-tuning got
# 0.59 of it with the embedded model and 0.76 with one of 13 M parameters, on two 0.28 with the embedded one.
EFFICIENCY = 0.4
SMALL = 10_000_000  # parameters of a model that the embedded one's recipe is for
LONG = 1800  # seconds worth a warning


@dataclass(frozen=True)
class Duration:
    """What a run computes, and how long that takes.

    tokens: of a step. width: of a row. operations: of floating-point numbers, in all of its steps. is_bound: whether
    tokens and operations are the most there may be. knobs: settings that make it less. preset: the experiment for a
    model as small as this one, if it is so small.
    """

    steps: int
    tokens: int
    width: int
    operations: float
    is_bound: bool
    knobs: str
    preset: str | None

    def __str__(self) -> str:
        most = "at most" if self.is_bound else "about"
        cost = f"{most} {self.tokens:,} tokens a step × {self.steps:,} steps, in rows of {self.width:,}"
        return f"{cost}: {most} {format_duration(self.seconds)} on this CPU"

    def warning(self) -> str:
        """The same with what to give instead."""
        remedy = f"lower {self.knobs}"
        if self.preset:
            remedy += f", or give experiment={self.preset}, which is for a model as small as this one"
        return f"{self}: {remedy}"

    def guess(self) -> str:
        """How far to believe it."""
        return (
            "that is a guess, from a matrix product timed just now; where it was tried it was right within a factor of"
            " 2. Phase by phase GPUs are planned: plan.device=h100"
        )

    @property
    def seconds(self) -> float:
        return self.operations / (EFFICIENCY * operations_per_second())

    @property
    def is_long(self) -> bool:
        return self.seconds > LONG


def update_operations(model: Architecture, batch: MicroBatch) -> float:
    """Floating-point operations of a step's forward and backward.

    They are products with weights, attention over whole rows, and logits of what is scored: 2 operations a weight and
    token forward and twice that backward (https://arxiv.org/abs/2001.08361).
    """
    scored = batch.step * batch.scored / (batch.rows * batch.width)
    attention = 2 * model.layers * model.queries * batch.width
    return 6.0 * (batch.step * (model.layer_parameters + attention) + scored * model.vocabulary * model.hidden)


def sampling_operations(model: Architecture, tokens: int, steps: int) -> float:
    """Floating-point operations of drawing so many tokens, each block in `steps` forwards."""
    return 2.0 * tokens * steps * (model.layer_parameters + model.vocabulary * model.hidden)


def operations_per_second() -> float:
    """Speed of a product of two matrices that fit the cache, on the threads there are: the best of four tries."""
    size = 512
    matrix = torch.ones(size, size)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)


def format_duration(seconds: float) -> str:
    """A duration such as `20 minutes`, `3 hours`, `5 days`."""
    for unit, size in (("days", 86_400), ("hours", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{max(2, seconds / 60):.0f} minutes"
