"""Two evaluations side by side: whether they differ by more than chance would have it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from dirl_cli.evaluation.answers import GradedAnswer
from dirl_cli.evaluation.metrics import Metrics, by_problem
from dirl_cli.evaluation.result_card import Evaluation
from dirl_cli.text import with_digits

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


def accuracy_terms(group: Sequence[GradedAnswer]) -> tuple[float, float]:
    """Problems weigh alike, however many answers each has: a share of each problem, over one."""
    return 100 * fmean(answer.correct for answer in group), 1


def credit_terms(group: Sequence[GradedAnswer]) -> tuple[float, float]:
    """As accuracy, with what is right in part; answers of earlier versions were right or wrong."""
    return 100 * fmean(answer.correct if answer.credit is None else answer.credit for answer in group), 1


def length_terms(group: Sequence[GradedAnswer]) -> tuple[float, float]:
    return sum(answer.length for answer in group), len(group)


def speed_terms(group: Sequence[GradedAnswer]) -> tuple[float, float]:
    return sum(answer.tokens for answer in group), sum(answer.forwards for answer in group)


def accuracy_from_card(card: Metrics) -> tuple[float, float | None]:
    error = None
    if card.standard_error:
        error = 100 * card.standard_error
    return 100 * card.accuracy, error


def credit_from_card(card: Metrics) -> tuple[float | None, float | None]:
    return None if card.credit is None else 100 * card.credit, None


CREDIT = "credit %"
MEASURES = {
    "accuracy %": Measure(accuracy_terms, accuracy_from_card, digits=1),
    CREDIT: Measure(credit_terms, credit_from_card, digits=1),
    "length": Measure(length_terms, lambda card: (card.length, None), digits=1),
    "tok/fwd": Measure(speed_terms, lambda card: (card.tokens_per_forward, None), digits=2),
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
    common = []
    for problem in sorted(answered):
        # A directory may lack the digests, as a card alone does: what an id stands for is then not known.
        if problem in a.problems and a.problems[problem] == b.problems.get(problem):
            common.append(problem)
    return common


def compare(a: Evaluation, b: Evaluation, common: Sequence[str]) -> Iterator[tuple[str, Difference]]:
    """The measures that are known of both, by name: over the common problems, or from the cards if there are none.

    Errors over common problems are those of the jackknife, which leaves out one problem at a time: for a mean s/√n of
    the differences, and right for a ratio of sums too.
    """
    for name, measure in MEASURES.items():
        a_value, a_error = measure.from_card(a.metrics)
        b_value, b_error = measure.from_card(b.metrics)
        if a_value is None or b_value is None:
            continue
        if name == CREDIT and not any(has_partial_credit(evaluation.metrics) for evaluation in (a, b)):
            continue  # it would be the accuracy again
        if len(common) > 1:
            # Of each evaluation: the measure over all problems, then without each of them in turn.
            a_all, *a_without = without_each(sums_by_problem(a, common, measure))
            b_all, *b_without = without_each(sums_by_problem(b, common, measure))
            error = jackknife([y - x for x, y in zip(a_without, b_without, strict=True)])
            is_seen = error > 1e-9  # and not but for rounding zero
            yield name, Difference(a_all, b_all, error if is_seen else None)
        elif a_error is None or b_error is None:
            yield name, Difference(a_value, b_value, None)
        else:
            yield name, Difference(a_value, b_value, hypot(a_error, b_error))


def has_partial_credit(metrics: Metrics) -> bool:
    """Whether some answers were right in part."""
    return metrics.credit is not None and metrics.credit != metrics.accuracy


def sums_by_problem(evaluation: Evaluation, problems: Sequence[str], measure: Measure) -> list[tuple[float, float]]:
    """Both sums of a measure for each of the problems."""
    groups = by_problem(evaluation.answers)
    return [measure.terms(groups[problem]) for problem in problems]


def without_each(terms: Sequence[tuple[float, float]]) -> list[float]:
    """The ratio of the sums of all terms, then of all but the first, all but the second, and so on."""
    over = sum(x for x, _ in terms)
    under = sum(y for _, y in terms)
    return [(over - x) / (under - y) for x, y in [(0.0, 0.0), *terms]]


def jackknife(values: Sequence[float]) -> float:
    """The standard error of an estimate whose values without each of n observations these are."""
    return sqrt(len(values) - 1) * pstdev(values)


def differing_settings(a: Evaluation, b: Evaluation) -> list[str]:
    """What is known of both and not the same about how their answers came about, as `key: A's → B's`."""
    a_settings = settings(a.card)
    b_settings = settings(b.card)
    differing = []
    for key, value in a_settings.items():
        if key in b_settings and b_settings[key] != value:
            differing.append(f"{key}: {value} → {b_settings[key]}")
    return differing


def settings(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of how its answers came about, by dotted name."""
    # A benchmark's name stands for where its file lies and how that is read.
    dotted = {}
    for group in ("bench", "instruction", "decoding"):
        for key, value in card.get(group, {}).items():
            name = f"{group}.{key}"
            if group != "bench" or name in BENCH_SETTINGS:
                dotted[name] = value
    for key in ("samples", "dtype", "grade_timeout"):
        if key in card:
            dotted[key] = card[key]
    for name, digest in card.get("scorers", {}).items():
        dotted[f"the code of {name}"] = str(digest)[:8]
    return dotted


def difference_cells(name: str, difference: Difference) -> dict[str, str]:
    """A row of the table that shows a comparison."""
    digits = MEASURES[name].digits
    cells = {
        "A": with_digits(difference.a, digits),
        "B": with_digits(difference.b, digits),
        "B - A": f"{difference.b - difference.a:+.{digits}f}",
        "z": with_digits(difference.z, 1),
        "> 1 s.e.": "",
        "> 2 s.e.": "",
    }
    if difference.error is not None and difference.z is not None:
        cells["B - A"] += f" ± {with_digits(difference.error, digits)}"
        for n in (1, 2):
            cells[f"> {n} s.e."] = "yes" if abs(difference.z) > n else "no"
    return cells
