"""The training runs of a sweep together: a table with seeds as their mean ± its standard error, and a CSV file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from dirl_cli.console import PlainConsole
from dirl_cli.evaluation.metrics import standard_error
from dirl_cli.evaluation.report import csv_text, draw
from dirl_cli.evaluation.sweep import folder_of, overrides, with_means
from dirl_cli.files import write_text
from dirl_cli.report.metrics_log import read_metrics
from dirl_cli.text import with_digits

CAPTION = "What each run measured last. ±: the standard error over seeds."
PASSING = ("time", "seconds/", "epoch")  # metrics of a step that say nothing of the run's end


@dataclass(frozen=True)
class Column:
    """How the table shows a metric. scale: what its values are multiplied with, such as 100 for percent."""

    header: str
    digits: int
    scale: float = 1.0


@dataclass(frozen=True)
class TrainingRun:
    """A run of a sweep: the overrides that set it apart, and the last value of each of its metrics."""

    overrides: Mapping[str, str]
    directory: Path
    metrics: Mapping[str, float]


def show_sweep(title: str, jobs: Sequence[tuple[Sequence[str], Path]], columns: Mapping[str, Column]) -> None:
    """Print the table of a sweep's runs and write all their metrics as CSV beside their directories.

    title: what was swept over. jobs: the overrides that set each run apart, and its directory. columns: by metric.
    """
    runs = []
    for words, out in jobs:
        metrics = last_values(read_metrics(out / "metrics.jsonl"))
        runs.append(TrainingRun(overrides(words), out, metrics))

    file = folder_of(jobs) / f"{title}.csv"
    lines = [{**run.overrides, **run.metrics, "directory": str(run.directory)} for run in runs]
    write_text(file, csv_text(lines))

    console = PlainConsole(soft_wrap=True)
    rows = with_means(runs, partial(run_cells, columns=columns))
    console.print(draw(title, rows, ", ".join(runs[0].overrides), CAPTION))
    console.print(str(file))


def last_values(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last value of each metric that was measured, in the order of their names' first appearance."""
    values: dict[str, float] = {}
    for line in history:
        values |= line
    return {name: value for name, value in values.items() if not name.startswith(PASSING)}


def run_cells(runs: Sequence[TrainingRun], columns: Mapping[str, Column]) -> dict[str, str]:
    """The mean of each metric over some runs, with its standard error where they differ, such as 63.2 ± 1.5."""
    cells = {}
    for name, column in columns.items():
        values = [column.scale * run.metrics[name] for run in runs if name in run.metrics]
        if len(values) < len(runs):  # a mean of only some of them would be another number
            cells[column.header] = ""
            continue
        cells[column.header] = with_digits(fmean(values), column.digits)
        if error := standard_error(values):
            cells[column.header] += f" ± {with_digits(error, column.digits)}"
    return cells
