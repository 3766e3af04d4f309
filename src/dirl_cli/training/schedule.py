"""Learning-rate schedules: what the learning rate is multiplied by at a step (from 0) of a run."""

import math
from dataclasses import dataclass
from typing import Protocol

from dirl_cli.ranges import Share, ShareOrCount


class Schedule(Protocol):
    """A learning-rate schedule."""

    def __call__(self, step: int, steps: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The full rate after the warm-up."""

    warmup: ShareOrCount

    def __call__(self, step: int, steps: int) -> float:
        return rise(step, warmup_steps(self.warmup, steps))


@dataclass(frozen=True)
class Linear:
    """A straight line from the full rate to `floor` times it."""

    warmup: ShareOrCount
    floor: Share

    def __call__(self, step: int, steps: int) -> float:
        warmup = warmup_steps(self.warmup, steps)
        return rise(step, warmup) * (1 - (1 - self.floor) * progress(step, warmup, steps))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the full rate to `floor` times it."""

    warmup: ShareOrCount
    floor: Share

    def __call__(self, step: int, steps: int) -> float:
        warmup = warmup_steps(self.warmup, steps)
        fallen = (1 - math.cos(math.pi * progress(step, warmup, steps))) / 2
        return rise(step, warmup) * (1 - (1 - self.floor) * fallen)


def warmup_remark(schedule: Schedule, steps: int) -> str | None:
    """What there is to say of a warm-up that is longer than the run."""
    if not isinstance(schedule, Constant | Linear | Cosine) or warmup_steps(schedule.warmup, steps) <= steps:
        return None
    reached = steps / warmup_steps(schedule.warmup, steps)
    return f"schedule.warmup={schedule.warmup:g} is longer than the run: rates come to {reached:.0%} of their full ones"


def warmup_steps(warmup: float, steps: int) -> int:
    """A number below 1 is a fraction of the run, any other a number of steps."""
    return round(warmup * steps) if warmup < 1 else int(warmup)


def rise(step: int, warmup: int) -> float:
    """A line that reaches 1 with the last warm-up step; the first step already learns."""
    return min(1.0, (step + 1) / max(warmup, 1))


def progress(step: int, warmup: int, steps: int) -> float:
    """How much of the run after the warm-up is over: 0 at its end, 1 with the last step."""
    return min(max(step + 1 - warmup, 0) / max(steps - warmup, 1), 1.0)
