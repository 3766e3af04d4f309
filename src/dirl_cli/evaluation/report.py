"""What an evaluation leaves: a table on the screen and a card on disk."""

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dirl_cli.evaluation.metrics import Metrics

CAPTION = "tok/step: tokens per denoising forward. tok/fwd: per forward, those that only cache included."


def table(title: str, rows: Mapping[str, Metrics]) -> Table:
    """A row for each named set of answers; columns for pass@k and maj@k where there are several samples."""
    k = max(next(iter(rows.values())).pass_at, default=1)
    several = [f"pass@{k}", f"maj@{k}"] if k > 1 else []
    drawn = Table(title=title, caption=CAPTION, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    drawn.padding = 0, 1, 0, 0
    drawn.add_column("")
    for column in ("problems", f"avg@{k} %", *several, "length", "cut %", "tok/step", "tok/fwd"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for name, metrics in rows.items():
        drawn.add_row(name, *cells(metrics))
    return drawn


def cells(metrics: Metrics) -> list[str]:
    several = [percent(metrics.pass_at[max(metrics.pass_at)])] if metrics.pass_at else []
    several += [percent(metrics.majority)] if metrics.majority is not None else []
    return [
        str(metrics.problems),
        accuracy(metrics),
        *several,
        f"{metrics.length:.0f}",
        percent(metrics.truncated),
        f"{metrics.tokens_per_denoising_forward:.2f}",
        f"{metrics.tokens_per_forward:.2f}",
    ]


def accuracy(metrics: Metrics) -> str:
    """Such as 63.2 ± 1.5."""
    error = "" if metrics.standard_error is None else f" ± {100 * metrics.standard_error:.1f}"
    return f"{percent(metrics.accuracy)}{error}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"
