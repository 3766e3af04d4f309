"""The evaluations of a sweep together: the cells of one table, one CSV file, the points of one picture."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dirl_cli.evaluation import report
from dirl_cli.evaluation.aup import Curve, Speed, curve_of, weight
from dirl_cli.evaluation.metrics import Metrics, mean_over_benchmarks, mean_over_seeds
from dirl_cli.evaluation.result_card import Evaluation
from dirl_cli.report.plot import Point
from dirl_cli.text import with_digits

PUBLISHED = (
    "published: avg@16 of the papers; z: by how many of our standard errors ours is above it,"
    " where our settings are theirs."
)
MEANS = "Of a mean of seeds, ± is its standard error over the seeds."
OVER_BENCHMARKS = (
    "mean: over the benchmarks, of which each weighs alike; ± is √Σs²/n, s being the standard error of each of n."
)
SERIES_KEYS = {"model", "model.path", "bench", "bench.path"}  # keys that a curve does not run through
BENCH_KEYS = ("bench", "bench.path")
KNOBS = ("decoding.threshold", "decoding.denoising_steps")  # that trade accuracy for speed: a curve runs through them
AUP = "AUP: accuracy under parallelism, the weighted area under accuracy by TPF (arXiv 2601.07568)."
TPF = "TPF: tokens before the stop token per forward."


class Job(Protocol):
    """One of a sweep's, and the overrides that set it apart."""

    @property
    def overrides(self) -> Mapping[str, str]: ...


J = TypeVar("J", bound=Job)


@dataclass(frozen=True)
class Member:
    """An evaluation of a sweep, and the overrides that set it apart."""

    overrides: Mapping[str, str]
    evaluation: Evaluation

    def label(self, *without: str) -> str:
        return ", ".join(value for key, value in self.overrides.items() if key not in without)


def overrides(words: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE words by key, without the quotes that Hydra needs around paths."""
    values = {}
    for word in words:
        key, _, value = word.partition("=")
        values[key] = value.strip("'")
    return values


def folder_of(jobs: Sequence[tuple[Sequence[str], Path]]) -> Path:
    """Where the directories of a sweep's jobs lie."""
    return Path(os.path.commonpath([out.parent for _, out in jobs]))


def common_names(sweep: Sequence[Member]) -> list[str]:
    """The model's name where all have the same one, and likewise the benchmark's."""
    common = []
    for group in ("model", "bench"):
        names = {member.evaluation.card.get(group, {}).get("name") for member in sweep}
        if len(names) == 1:
            common += [name for name in names if name]
    return common


def with_means(jobs: Sequence[J], cells: Callable[[Sequence[J]], dict[str, str]]) -> dict[str, dict[str, str]]:
    """The cells of each job by its label; below jobs that differ in their seeds alone, those of their mean."""
    # Jobs whose overrides differ in the seed alone are runs of one setting.
    by_settings: dict[tuple[str, ...], list[J]] = defaultdict(list)
    for job in jobs:
        settings = tuple(value for key, value in job.overrides.items() if key != "seed")
        by_settings[settings].append(job)

    table = {}
    for settings, seeds in by_settings.items():
        for job in seeds:
            table[", ".join(job.overrides.values())] = cells([job])
        if len(seeds) > 1:
            table[", ".join([*settings, f"mean of {len(seeds)} seeds"])] = cells(seeds)
    return table


def rows(sweep: Sequence[Member]) -> dict[str, dict[str, str]]:
    """The cells of each evaluation, of the mean of seeds, and of the mean over benchmarks, by label."""
    k = report.common_k(member.evaluation.metrics for member in sweep)
    cells = with_means(sweep, partial(member_cells, k=k))
    for label, mean in means_over_benchmarks(sweep).items():
        cells[label] = metric_columns(mean, k, "")
    return cells


def means_over_benchmarks(sweep: Sequence[Member]) -> dict[str, Metrics]:
    """What was measured on average over the benchmarks of each setting that was tried on several, by a label."""
    by_settings: dict[str, list[Member]] = defaultdict(list)
    for member in sweep:
        by_settings[member.label(*BENCH_KEYS)].append(member)

    means = {}
    for settings, members in by_settings.items():
        names = {member.evaluation.card["bench"]["name"] for member in members}
        if len(names) == len(members) > 1:
            label = f"{settings}, mean" if settings else "mean"
            means[label] = mean_over_benchmarks([member.evaluation.metrics for member in members])
    return means


def member_cells(members: Sequence[Member], k: str) -> dict[str, str]:
    """A row for an evaluation, or for the mean of several; the published figure follows the accuracy of one."""
    if len(members) == 1:
        metrics = members[0].evaluation.metrics
        figure = published(members[0].evaluation.card)
    else:
        metrics = mean_over_seeds([member.evaluation.metrics for member in members])
        figure = ""

    return metric_columns(metrics, k, figure)


def metric_columns(metrics: Metrics, k: str, figure: str) -> dict[str, str]:
    """The columns of a sweep's table. figure: what is published of the evaluation, "" for nothing."""
    # A sweep's table is wide already: two columns make room for the published figure.
    cells = {}
    for name, cell in report.metric_cells(metrics, k).items():
        if name not in ("problems", "cut %"):
            cells[name] = cell
        if name == "95 %":
            cells["published (z)"] = figure
    cells["TPF"] = with_digits(metrics.tpf, 2)
    return cells


def caption(sweep: Sequence[Member], labels: Sequence[str]) -> str:
    """What the table's columns are, and the ± of its means if it has any. labels: of its rows."""
    lines = [report.CAPTION]
    if any(member.evaluation.metrics.tpf for member in sweep):
        lines.append(TPF)
    if any("published" in member.evaluation.card for member in sweep):
        lines.append(PUBLISHED)
    over_benchmarks = means_over_benchmarks(sweep)
    if len(labels) > len(sweep) + len(over_benchmarks):
        lines.append(MEANS)
    if over_benchmarks:
        lines.append(OVER_BENCHMARKS)
    if areas_text(speed_curves(sweep)):
        lines.append(AUP)
    return "\n".join(lines)


def published(card: Mapping[str, Any]) -> str:
    """The published accuracy with its z, such as 83.05 (-0.4); no z where our settings are not the published ones."""
    figure = card.get("published")
    if not figure:
        return ""
    accuracy = f"{figure['accuracy']:g}"
    if figure["differently"] or figure["standard_errors"] is None:
        return accuracy
    return f"{accuracy} ({figure['standard_errors']:+.1f})"


def as_csv(sweep: Sequence[Member]) -> str:
    """A line for each evaluation: what sets it apart, then all that was measured."""
    curves = speed_curves(sweep)
    lines: list[dict[str, Any]] = []
    for member in sweep:
        metrics = asdict(member.evaluation.metrics)
        pass_at = {f"pass_at_{m}": share for m, share in metrics.pop("pass_at").items()}
        of_curve = {}
        curve = curves.get(method_of(member))
        if curve and len(curve.points) > 1:
            of_curve = {"aup": curve.area, "aup_weight": weight(100 * member.evaluation.metrics.accuracy, curve.best)}
        lines.append({**member.overrides, **metrics, **pass_at, **of_curve, "directory": member.evaluation.name})
    return report.csv_text(lines)


def as_card(sweep: Sequence[Member]) -> dict[str, Any]:
    """All of a sweep as one card: its evaluations' own cards, what sets each apart, and the means over benchmarks."""
    evaluations = []
    for member in sweep:
        evaluations.append(
            {"overrides": member.overrides, "directory": member.evaluation.name, **member.evaluation.card}
        )
    means = {label: asdict(metrics) for label, metrics in means_over_benchmarks(sweep).items()}
    curves = {method: asdict(curve) for method, curve in speed_curves(sweep).items() if len(curve.points) > 1}
    for curve in curves.values():
        curve["points"] = [Speed(*point)._asdict() for point in curve["points"]]
    return {"evaluations": evaluations, "means_over_benchmarks": means, "aup": curves}


def speed_curves(sweep: Sequence[Member]) -> dict[str, Curve]:
    """The curve of each method on each benchmark, through the settings of KNOBS that it was tried with.

    What else sets evaluations apart, such as a model, a strategy or a seed, are different methods.
    """
    points: dict[str, list[Speed]] = defaultdict(list)
    best: dict[str, float] = defaultdict(float)  # by benchmark, of all methods
    bench_of = {}
    for member in sweep:
        metrics = member.evaluation.metrics
        if not metrics.tpf:
            continue
        method = method_of(member)
        bench = member.evaluation.card["bench"]["name"]
        accuracy = 100 * metrics.accuracy
        points[method].append(Speed(metrics.tpf, accuracy, member.label(*SERIES_KEYS) or method))
        bench_of[method] = bench
        best[bench] = max(best[bench], accuracy)
    return {method: curve_of(speeds, best[bench_of[method]]) for method, speeds in points.items()}


def method_of(member: Member) -> str:
    """What a curve is of: the model, the benchmark, and what else is swept but the knobs of speed."""
    others = member.label(*SERIES_KEYS, *KNOBS)
    return f"{member.evaluation.of}, {others}" if others else member.evaluation.of


def series_drawn(sweep: Sequence[Member]) -> dict[str, list[Point]]:
    """What a picture shows: TPF, accuracy, its standard error and a label, by method and its area; slowest first."""
    curves = speed_curves(sweep)
    series: dict[str, list[Point]] = defaultdict(list)
    for member in sweep:
        metrics = member.evaluation.metrics
        method = method_of(member)
        if method not in curves or not metrics.tpf:
            continue
        curve = curves[method]
        name = method
        if len(curve.points) > 1 and curve.area is not None:
            name = f"{method}: AUP {curve.area:.1f}"
        label = member.label(*SERIES_KEYS) or method
        series[name].append((metrics.tpf, metrics.accuracy, metrics.standard_error or 0.0, label))
    return {name: sorted(points) for name, points in series.items()}


def areas_text(curves: Mapping[str, Curve]) -> str:
    """A line for each curve of several settings: its area, or why it has none; "" where there is no such curve."""
    lines = []
    for method, curve in curves.items():
        if len(curve.points) > 1:
            lines.append(f"AUP of {method}: {curve.refusal or f'{curve.area:.1f}'}")
    return "\n".join(lines)
