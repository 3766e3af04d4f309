"""Accuracy under parallelism (AUP, arXiv 2601.07568): an area under accuracy by tokens per forward.

Of points (ρ, y) in the order of ρ, y in %, the slowest first:

    AUP = ρ₁ y₁ + Σᵢ ½ (ρᵢ - ρᵢ₋₁) (yᵢ W(yᵢ) + yᵢ₋₁ W(yᵢ₋₁)),   W(y) = min(1, exp(-3 (1 - y/y_max)))

y_max is the best accuracy of all methods that are compared. Points more than 5 below y₁ are left out; where the fastest
is one, the authors' code refuses to compute it, and so there is none here. After hao-ai-lab/d3LLM (aup_utils.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from typing import NamedTuple

STEEPNESS = 3.0
ALLOWED_LOSS = 5.0  # points of accuracy below the slowest setting's
ROUNDING = 1e-9


class Speed(NamedTuple):
    """A setting that was measured. tpf: tokens per forward. accuracy: in %. label: which setting it is."""

    tpf: float
    accuracy: float
    label: str = ""


@dataclass(frozen=True)
class Curve:
    """What one method's settings amount to.

    area: its AUP, None where that is not defined; refusal: then why, in a sentence. best: y_max, in %.
    points: all of them, in order of speed. weights: W of each. counted: whether it is in the area.
    """

    area: float | None
    refusal: str
    best: float
    points: tuple[Speed, ...]
    weights: tuple[float, ...]
    counted: tuple[bool, ...]


def curve_of(settings: Sequence[Speed], best: float) -> Curve:
    """The curve of a method. best: the highest accuracy of any method on the same problems, in %."""
    points = tuple(sorted(settings, key=lambda point: point.tpf))
    weights = tuple(weight(point.accuracy, best) for point in points)
    lowest = points[0].accuracy - ALLOWED_LOSS - ROUNDING
    counted = tuple(point.accuracy >= lowest for point in points)

    fastest = points[-1]
    if not counted[-1]:
        lost = points[0].accuracy - fastest.accuracy
        refusal = f"the fastest setting, {fastest.label}, loses {lost:.1f} points, more than 5: sweep without it"
        return Curve(None, refusal, best, points, weights, counted)

    kept = [(point, w) for point, w, counts in zip(points, weights, counted, strict=True) if counts]
    area = points[0].tpf * points[0].accuracy
    for (before, w_before), (point, w) in pairwise(kept):
        height = (point.accuracy * w + before.accuracy * w_before) / 2
        area += (point.tpf - before.tpf) * height
    return Curve(area, "", best, points, weights, counted)


def weight(accuracy: float, best: float) -> float:
    """W(y) of an accuracy; 1 where no method has any right answer, so that the area is 0."""
    if best == 0:
        return 1.0
    return min(1.0, exp(-STEEPNESS * (1 - accuracy / best)))
