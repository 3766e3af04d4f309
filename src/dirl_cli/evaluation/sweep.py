"""The evaluations of a sweep together: the cells of one table, one CSV file, the points of one picture."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dirl_cli.evaluation import report
from dirl_cli.evaluation.metrics import Metrics, mean_over_benchmarks, mean_over_seeds
from dirl_cli.evaluation.result_card import Evaluation

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
    return cells


def caption(sweep: Sequence[Member], labels: Sequence[str]) -> str:
    """What the table's columns are, and the ± of its means if it has any. labels: of its rows."""
    lines = [report.CAPTION]
    if any("published" in member.evaluation.card for member in sweep):
        lines.append(PUBLISHED)
    over_benchmarks = means_over_benchmarks(sweep)
    if len(labels) > len(sweep) + len(over_benchmarks):
        lines.append(MEANS)
    if over_benchmarks:
        lines.append(OVER_BENCHMARKS)
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
    lines: list[dict[str, Any]] = []
    for member in sweep:
        metrics = asdict(member.evaluation.metrics)
        pass_at = {f"pass_at_{m}": share for m, share in metrics.pop("pass_at").items()}
        lines.append({**member.overrides, **metrics, **pass_at, "directory": member.evaluation.name})
    return csv_text(lines)


def as_card(sweep: Sequence[Member]) -> dict[str, Any]:
    """All of a sweep as one card: its evaluations' own cards, what sets each apart, and the means over benchmarks."""
    evaluations = []
    for member in sweep:
        evaluations.append(
            {"overrides": member.overrides, "directory": member.evaluation.name, **member.evaluation.card}
        )
    means = {label: asdict(metrics) for label, metrics in means_over_benchmarks(sweep).items()}
    return {"evaluations": evaluations, "means_over_benchmarks": means}


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines with a column for every key that any of them has, in the order in which they come."""
    columns: dict[str, None] = {}  # a set that keeps its order
    for line in lines:
        columns |= dict.fromkeys(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def speed_curves(sweep: Sequence[Member]) -> dict[str, list[tuple[float, float, float, str]]]:
    """Tokens per forward, accuracy, its standard error and a label, by model and benchmark; the slowest first."""
    points = defaultdict(list)
    for member in sweep:
        metrics = member.evaluation.metrics
        if metrics.tokens_per_forward is None:
            continue
        series = member.evaluation.of
        label = member.label(*SERIES_KEYS) or series
        points[series].append((metrics.tokens_per_forward, metrics.accuracy, metrics.standard_error or 0.0, label))
    return {series: sorted(of_series) for series, of_series in points.items()}
