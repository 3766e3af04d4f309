"""Two evaluations side by side: whether they differ by more than chance would have it."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from dirl_cli.evaluation.answers import GradedAnswer
from dirl_cli.evaluation.metrics import Metrics
from dirl_cli.evaluation.report import number
from dirl_cli.evaluation.result_card import Evaluation

CAPTION = (
    "z: the difference in standard errors (s.e.); by chance alone it exceeds 1 in one comparison of three,"
    " 2 in one of twenty."
)
BENCH_SETTINGS = ("bench.name", "bench.limit", "bench.ids")


class Measure(NamedTuple):
    """A ratio of two sums over problems; the same and its standard error from a card, as far as it has them."""

    terms: Callable[[Sequence[GradedAnswer]], tuple[float, float]]
    from_card: Callable[[Metrics], tuple[float | None, float | None]]
    digits: int


MEASURES = {
    "accuracy %": Measure(
        lambda group: (100 * fmean(answer.correct for answer in group), 1),
        lambda card: (100 * card.accuracy, 100 * card.standard_error if card.standard_error else None),
        digits=1,
    ),
    "length": Measure(
        lambda group: (sum(answer.length for answer in group), len(group)),
        lambda card: (card.length, None),
        digits=1,
    ),
    "tok/fwd": Measure(
        lambda group: (sum(answer.tokens for answer in group), sum(answer.forwards for answer in group)),
        lambda card: (card.tokens_per_forward, None),
        digits=2,
    ),
}


@dataclass(frozen=True)
class Difference:
    """One measure of both; error: the standard error of b - a.

    It is None where it cannot be told: of a single problem, or where all differ alike, as three that are all right do
    from three that are all wrong. That no spread was seen does not say that there is none.
    """

    a: float
    b: float
    error: float | None

    @property
    def z(self) -> float | None:
        """The difference in standard errors."""
        return None if self.error is None else (self.b - self.a) / self.error


def common_problems(a: Evaluation, b: Evaluation) -> list[str]:
    """The problems that both have answers to; one of the same id but with another question or answer is not common."""
    answered = {answer.problem for answer in a.answers} & {answer.problem for answer in b.answers}
    return sorted(i for i in answered if i in a.problems and a.problems[i] == b.problems.get(i))


def compare(a: Evaluation, b: Evaluation, common: Sequence[str]) -> Iterator[tuple[str, Difference]]:
    """The measures that are known of both, by name: over the common problems, or from the cards if there are none.

    Errors over common problems are those of the jackknife, which leaves out one problem at a time: for a mean s/√n of
    the differences, and right for a ratio of sums too.
    """
    for name, measure in MEASURES.items():
        (left, left_error), (right, right_error) = measure.from_card(a.metrics), measure.from_card(b.metrics)
        if left is None or right is None:
            continue
        if len(common) > 1:
            lefts, rights = (without_each(sums(evaluation, common, measure)) for evaluation in (a, b))
            error = jackknife([y - x for x, y in zip(lefts[1:], rights[1:], strict=True)])
            is_seen = error > 1e-9  # and not but for rounding zero
            yield name, Difference(lefts[0], rights[0], error if is_seen else None)
        else:
            errors = [error for error in (left_error, right_error) if error is not None]
            yield name, Difference(left, right, hypot(*errors) if len(errors) == 2 else None)


def sums(evaluation: Evaluation, problems: Sequence[str], measure: Measure) -> list[tuple[float, float]]:
    groups: dict[str, list[GradedAnswer]] = defaultdict(list)
    for answer in evaluation.answers:
        groups[answer.problem].append(answer)
    return [measure.terms(groups[problem]) for problem in problems]


def without_each(terms: Sequence[tuple[float, float]]) -> list[float]:
    """The ratio of the sums of all terms, then of all but the first, all but the second, and so on."""
    over, under = (sum(part) for part in zip(*terms, strict=True))
    return [(over - x) / (under - y) for x, y in [(0.0, 0.0), *terms]]


def jackknife(values: Sequence[float]) -> float:
    """The standard error of an estimate whose values without each of n observations these are."""
    return sqrt(len(values) - 1) * pstdev(values)


def differing_settings(a: Evaluation, b: Evaluation) -> list[str]:
    """What is known of both and not the same about how their answers came about, as `key: A's → B's`."""
    left, right = (settings(evaluation.card) for evaluation in (a, b))
    return [f"{key}: {left[key]} → {right[key]}" for key in left if key in right and left[key] != right[key]]


def settings(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of how its answers came about, by dotted name."""
    groups = {group: card.get(group, {}) for group in ("bench", "instruction", "decoding")}
    dotted = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    known = {key: dotted[key] for key in dotted if not key.startswith("bench.") or key in BENCH_SETTINGS}
    return known | {key: card[key] for key in ("samples", "dtype", "grade_timeout") if key in card}


def cells(name: str, difference: Difference) -> dict[str, str]:
    """A row of the table that shows a comparison."""
    digits, z = MEASURES[name].digits, difference.z
    error = "" if difference.error is None else f" ± {number(difference.error, digits)}"
    beyond = {f"> {n} s.e.": "" if z is None else "yes" if abs(z) > n else "no" for n in (1, 2)}
    return {
        "A": number(difference.a, digits),
        "B": number(difference.b, digits),
        "B - A": f"{difference.b - difference.a:+.{digits}f}{error}",
        "z": number(z, 1),
        **beyond,
    }
