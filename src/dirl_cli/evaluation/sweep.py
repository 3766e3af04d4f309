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
from dirl_cli.evaluation.metrics import mean_over_seeds
from dirl_cli.evaluation.result_card import Evaluation

PUBLISHED = (
    "published: avg@16 of the papers; z: by how many of our standard errors ours is above it,"
    " where our settings are theirs."
)
MEANS = "Of a mean of seeds, ± is its standard error over the seeds."
TOLD_APART = {"model", "model.path", "bench", "bench.path"}  # keys that a curve does not run through


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
    return {key: value.strip("'") for key, _, value in (word.partition("=") for word in words)}


def folder_of(jobs: Sequence[tuple[Sequence[str], Path]]) -> Path:
    """Where the directories of a sweep's jobs lie."""
    return Path(os.path.commonpath([out.parent for _, out in jobs]))


def common_names(sweep: Sequence[Member]) -> list[str]:
    """The name of the model, if they all have one, and of the benchmark likewise."""
    names = [{member.evaluation.card.get(group, {}).get("name") for member in sweep} for group in ("model", "bench")]
    return [only for (only, *others) in names if only and not others]


def with_means(jobs: Sequence[J], cells: Callable[[Sequence[J]], dict[str, str]]) -> dict[str, dict[str, str]]:
    """The cells of each job by its label; below jobs that differ in their seeds alone, those of their mean."""
    by_rest: dict[tuple[str, ...], list[J]] = defaultdict(list)
    for job in jobs:
        rest = tuple(value for key, value in job.overrides.items() if key != "seed")
        by_rest[rest].append(job)

    found = {}
    for rest, seeds in by_rest.items():
        for job in seeds:
            found[", ".join(job.overrides.values())] = cells([job])
        if len(seeds) > 1:
            found[", ".join([*rest, f"mean of {len(seeds)} seeds"])] = cells(seeds)
    return found


def rows(sweep: Sequence[Member]) -> dict[str, dict[str, str]]:
    """The cells of each evaluation, and of the mean of seeds, by label."""
    return with_means(sweep, partial(cells, k=report.common_k(member.evaluation.metrics for member in sweep)))


def cells(members: Sequence[Member], k: str) -> dict[str, str]:
    """Those of an evaluation, or of the mean of several; what is published stands beside the accuracy of one."""
    metrics, figure = members[0].evaluation.metrics, published(members[0].evaluation.card)
    if len(members) > 1:
        metrics, figure = mean_over_seeds([member.evaluation.metrics for member in members]), ""
    _, ours, interval, *others = report.cells(metrics, k).items()
    shown = (ours, interval, ("published (z)", figure), *others)
    return {name: cell for name, cell in shown if name != "cut %"}


def caption(sweep: Sequence[Member], labels: Sequence[str]) -> str:
    """What the table's columns are, and the ± of its means if it has any. labels: of its rows."""
    lines = [report.CAPTION]
    if any("published" in member.evaluation.card for member in sweep):
        lines.append(PUBLISHED)
    if len(labels) > len(sweep):
        lines.append(MEANS)
    return "\n".join(lines)


def published(card: Mapping[str, Any]) -> str:
    """Such as 83.05 (-0.4); z is left out where our settings are not the published ones."""
    figure = card.get("published")
    if not figure:
        return ""
    comparable = not figure["differently"] and figure["standard_errors"] is not None
    return f"{figure['accuracy']:g}" + (f" ({figure['standard_errors']:+.1f})" if comparable else "")


def as_csv(sweep: Sequence[Member]) -> str:
    """A line for each evaluation: what sets it apart, then all that was measured."""
    lines: list[dict[str, Any]] = []
    for member in sweep:
        metrics = asdict(member.evaluation.metrics)
        passed = {f"pass_at_{m}": share for m, share in metrics.pop("pass_at").items()}
        lines.append({**member.overrides, **metrics, **passed, "directory": member.evaluation.name})
    return csv_text(lines)


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines with a column for every key that any of them has, in the order in which they come."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def curves(sweep: Sequence[Member]) -> dict[str, list[tuple[float, float, float, str]]]:
    """Tokens per forward, accuracy, its standard error and a label, by model and benchmark; the slowest first."""
    found = defaultdict(list)
    for member in sweep:
        metrics = member.evaluation.metrics
        if metrics.tokens_per_forward is not None:
            point = metrics.tokens_per_forward, metrics.accuracy, metrics.standard_error or 0.0
            series = member.evaluation.of
            found[series].append((*point, member.label(*TOLD_APART) or series))
    return {series: sorted(points) for series, points in found.items()}
