"""What an evaluation shows: a table, its lines as CSV, and the published figure beside ours."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from dirl_cli.evaluation.metrics import Metrics
from dirl_cli.text import percent, with_digits

INTERVAL = "±: standard error over problems. 95 %: Wilson's interval, also where all are right or wrong."
SPEEDS = "tok/step: tokens per denoising forward. tok/fwd: per forward, those that only cache included."
CAPTION = f"{INTERVAL}\n{SPEEDS}"

# What the published figures were measured with (arXiv 2512.22234); `experiment=eval_paper` sets it.
PROTOCOL = {
    "samples": 16,
    "bench.limit": None,
    "bench.ids": None,
    "instruction.text": r"Please reason step by step, and put your final answer within $\boxed{}$.",
    "decoding.block_size": 4,
    "decoding.denoising_steps": 4,
    "decoding.threshold": 0.9,
    "decoding.confidence": "sampled",
    "decoding.temperature": 1.0,
    "decoding.top_k": 50,
    "decoding.top_p": 1.0,
    "decoding.max_new_tokens": 8192,
}


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines with a column for every key that any of them has, in the order in which they come."""
    columns: dict[str, None] = {}  # a set that keeps its order
    for line in lines:
        columns |= dict.fromkeys(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def table(title: str, rows: Mapping[str, Metrics], header: str = "") -> "Fitting":
    """A row for each named set of answers, a column for all that is known of any; `header` heads the names."""
    k = common_k(rows.values())
    cells = {}
    caption = INTERVAL
    for name, metrics in rows.items():
        cells[name] = metric_cells(metrics, k)
        if metrics.tokens_per_forward:
            caption = CAPTION
    return draw(title, cells, header, caption)


def draw(title: str, rows: Mapping[str, Mapping[str, str]], header: str = "", caption: str | None = None) -> "Fitting":
    """A table of text by row and column, without the columns that are empty in every row.

    Where it does not fit, each row is a name and its values in the lines below.
    """
    columns = []
    for name in next(iter(rows.values())):  # all rows have the same
        if any(row[name] for row in rows.values()):
            columns.append(name)

    # Names may be long, as the overrides of a sweep are: they alone are broken where the terminal is narrow.
    drawn = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    drawn.padding = 0
    drawn.add_column(header, overflow="fold")
    for column in columns:
        drawn.add_column(column, justify="right", no_wrap=True)
    lines = [title]
    for name, row in rows.items():
        cells = [row[column] for column in columns]
        drawn.add_row(name, *cells)
        values = [f"{column} {cell}" for column, cell in zip(columns, cells, strict=True) if cell]
        lines.append(f"{name}: {', '.join(values)}")
    if caption:
        lines.append(caption)
    return Fitting(drawn, "\n".join(lines))


@dataclass(frozen=True)
class Fitting:
    """A table, or its text where the terminal is too narrow for it."""

    table: Table
    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = console.measure(self.table, options=options.update(max_width=1000)).maximum
        yield self.table if needed <= options.max_width else Text(self.text)


def common_k(sets: Any) -> str:
    """How many answers to each problem there are in all of the sets, or the letter k where they differ."""
    ks = {max(metrics.pass_at, default=1) for metrics in sets}
    return str(ks.pop()) if len(ks) == 1 else "k"


def metric_cells(metrics: Metrics, k: str) -> dict[str, str]:
    """A row of a table of evaluations: text by column, empty where nothing is known."""
    largest = max(metrics.pass_at, default=None)
    return {
        "problems": str(metrics.problems),
        f"avg@{k} %": accuracy_text(metrics),
        "95 %": interval_text(metrics),
        f"pass@{k}": percent(None if largest is None else metrics.pass_at[largest]),
        f"maj@{k}": percent(metrics.majority),
        "credit %": credit_text(metrics),
        "length": with_digits(metrics.length, 0),
        "cut %": percent(metrics.truncated),
        "tok/step": with_digits(metrics.tokens_per_denoising_forward, 2),
        "tok/fwd": with_digits(metrics.tokens_per_forward, 2),
    }


def accuracy_text(metrics: Metrics) -> str:
    """The accuracy in %, such as 63.2 ± 1.5; the accuracy alone where nothing tells its standard error."""
    accuracy = percent(metrics.accuracy)
    if not metrics.standard_error:
        return accuracy
    return f"{accuracy} ± {100 * metrics.standard_error:.1f}"


def interval_text(metrics: Metrics) -> str:
    """The accuracy's 95 % interval in %, such as 43.9-100.0."""
    if metrics.low is None:
        return ""
    return f"{percent(metrics.low)}-{percent(metrics.high)}"


def credit_text(metrics: Metrics) -> str:
    """The mean credit in %, where it is not the accuracy."""
    return "" if metrics.credit == metrics.accuracy else percent(metrics.credit)


def beside(published: Sequence[float], ours: Metrics, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A published accuracy in %, tokens per denoising forward and length, and how far ours is from them.

    standard_errors: the difference in accuracy over our own standard error; the published one is not known.
    differently: those of our settings that are not the published ones, and these.
    """
    accuracy, tokens_per_step, length = published
    difference = 100 * ours.accuracy - accuracy
    standard_errors = None
    if ours.standard_error:
        standard_errors = difference / (100 * ours.standard_error)

    # Figures compare only under one protocol: where it was another, the card says in what.
    differently = {}
    for key, value in PROTOCOL.items():
        if settings[key] != value:
            differently[key] = [settings[key], value]
    return {
        "accuracy": accuracy,
        "tokens_per_step": tokens_per_step,
        "length": length,
        "difference": difference,
        "standard_errors": standard_errors,
        "differently": differently,
    }


def spell_published(published: Mapping[str, Any]) -> str:
    """The sentences about a published figure, as `beside` compared it."""
    errors = published["standard_errors"]
    distance = "" if errors is None else f", {abs(errors):.1f} of our standard errors"
    text = (
        f"published (avg@16): {published['accuracy']:g} %, {published['tokens_per_step']:g} tok/step,"
        f" length {published['length']:g}. Ours is {published['difference']:+.1f} points from it{distance}."
    )
    if not published["differently"]:
        return text
    differences = []
    for key, pair in published["differently"].items():
        own, of_protocol = ("none" if value is None else value for value in pair)
        differences.append(f"{key} {own} instead of {of_protocol}")
    settings = ", ".join(differences)
    return f"{text}\nOurs is another protocol ({settings}): experiment=eval_paper is the published one."
