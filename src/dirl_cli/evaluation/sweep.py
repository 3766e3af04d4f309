"""The evaluations of a sweep together: the cells of one table, one CSV file, the points of one picture."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dirl_cli.evaluation import report
from dirl_cli.evaluation.result_card import Evaluation

CAPTION = (
    f"{report.CAPTION} published: avg@16 of the papers; z: by how many of our standard errors ours is above it,"
    " where our settings are theirs."
)
TOLD_APART = {"model", "model.path", "bench", "bench.path"}  # keys that a curve does not run through


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


def rows(sweep: Sequence[Member]) -> dict[str, dict[str, str]]:
    """The cells of each evaluation by its label, what is published beside the accuracy."""
    k = report.common_k(member.evaluation.metrics for member in sweep)
    found = {}
    for member in sweep:
        _, ours, interval, *others = report.cells(member.evaluation.metrics, k).items()
        figure = ("published (z)", published(member.evaluation.card))
        found[member.label()] = {name: cell for name, cell in (ours, interval, figure, *others) if name != "cut %"}
    return found


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
