"""What the metrics of a run come to: of each its first, last and best value."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dirl_cli.overview.files import Numbers

HIGHER = re.compile(r"(?:accuracy|credit|reward|margin|tokens_per_forward|tokens_per_s)(?:/|$)")  # is better
LOWER = re.compile(r"loss$")
SHARES = re.compile(
    r"(?:accuracy|credit|kept|truncated|clipped|standard_error)(?:/|$)|^(?:low|high)$"
)  # of 1, as percentages
LEADING = (  # the metrics that are read first, in this order
    "loss",
    "validation_loss",
    "reward",
    "accuracy",
    "greedy_accuracy",
    "greedy_credit",
    "denoising_accuracy",
    "reward_margin",
    "reward_accuracy",
    "validation_reward_margin",
    "validation_reward_accuracy",
    "kept",
    "length",
    "truncated",
    "tokens_per_forward",
    "entropy",
    "kl",
    "grad_norm",
    "tokens_per_s",
)
SECONDS = "seconds/"  # of a phase of a step
PASSING = ("step", "time")


@dataclass(frozen=True)
class MetricCourse:
    """How a metric went. best: the best value and its step; None where neither more nor less is better."""

    name: str
    first: float
    last: float
    best: tuple[float, int] | None


def names_of(history: Sequence[Numbers]) -> list[str]:
    """The metrics of a run, the leading ones first and the seconds of its phases last."""
    measured: dict[str, None] = {}  # a set that keeps its order
    for line in history:
        measured |= dict.fromkeys(line)
    names = [name for name in measured if name not in PASSING]
    return sorted(names, key=rank_of)


def rank_of(name: str) -> int:
    if name.startswith(SECONDS):
        return len(LEADING) + 1
    family = name.partition("/")[0] if not name.startswith("reward/") else name  # parts of the reward come later
    return LEADING.index(family) if family in LEADING else len(LEADING)


def is_leading(name: str, command: str) -> bool:
    """Whether a metric is among those that are read first. Of RL's loss the gradient alone means something."""
    return rank_of(name) < len(LEADING) and not (command == "rl" and name == "loss")


def points_of(history: Sequence[Numbers], name: str) -> list[tuple[float, float]]:
    """The steps at which a metric was measured, and its values."""
    return [(line["step"], line[name]) for line in history if name in line]


def course_of(history: Sequence[Numbers], name: str) -> MetricCourse:
    """The course of a metric that was measured."""
    points = points_of(history, name)
    best = None
    if HIGHER.search(name):
        best = max(points, key=lambda point: point[1])
    elif LOWER.search(name):
        best = min(points, key=lambda point: point[1])
    return MetricCourse(name, points[0][1], points[-1][1], best and (best[1], int(best[0])))


def format_metric(name: str, value: float | None) -> str:
    """A value as it is read: shares in percent, others with four digits that count."""
    if value is None:
        return ""
    if SHARES.search(name):
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def phase_seconds(history: Sequence[Numbers]) -> dict[str, float]:
    """The seconds that each phase of the steps took in all."""
    total: dict[str, float] = {}
    for line in history:
        for name, value in line.items():
            if name.startswith(SECONDS):
                phase = name.removeprefix(SECONDS)
                total[phase] = total.get(phase, 0.0) + value
    return total


def course_cells(course: MetricCourse) -> Mapping[str, str]:
    """A row of a table of metrics."""
    best, at = course.best or (None, 0)
    return {
        "metric": course.name,
        "first": format_metric(course.name, course.first),
        "last": format_metric(course.name, course.last),
        "best": format_metric(course.name, best),
        "at step": str(at) if course.best else "",
    }
