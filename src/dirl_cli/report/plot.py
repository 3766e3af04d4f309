"""A run's curves as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from dirl_cli.files import GO_ON, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#33373d"
FAINT = "#d9dce1"
COLORS = ("#2f6db5", "#d9632a", "#3a8f5c", "#8a5fb0", "#a8842c")
Point = tuple[float, float, float, str]  # x, y (between 0 and 1), the standard error of y, a label
SPARSE = 60  # a curve of fewer points is drawn with markers and not smoothed


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `curves` maps names in the metrics to labels.

    percent: the values are shares of 1. log: a logarithmic axis. smooth: draw the mean over a fiftieth of the run.
    """

    title: str
    curves: Mapping[str, str]
    percent: bool = False
    log: bool = False
    smooth: bool = True


def plot(
    history: Sequence[Mapping[str, float]], panels: Sequence[Panel], title: str, file: Path, remedy: str = GO_ON
) -> None:
    """Draw the panels that have something to show, the first of them wide. remedy: where `file` cannot be written."""
    from matplotlib.figure import Figure

    measured = set().union(*history)
    drawn = [panel for panel in panels if not measured.isdisjoint(panel.curves)]

    # Below the wide panel at most four in a row, as evenly as they go.
    rows = ceil((len(drawn) - 1) / 4)
    columns = ceil((len(drawn) - 1) / rows) if rows else 1
    figure = Figure(figsize=(12, 3.9 + 2.5 * rows), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[3] + [2] * rows)
    for i, panel in enumerate(drawn):
        if i == 0:
            cell = grid[0, :]
        else:
            row, column = divmod(i - 1, columns)
            cell = grid[1 + row, column]
        axes = figure.add_subplot(cell)
        draw_panel(axes, panel, history)
        axes.set_xlim(0, history[-1]["step"])
    with writing(file, remedy):
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)


def draw_panel(axes: "Axes", panel: Panel, history: Sequence[Mapping[str, float]]) -> None:
    """Draw a panel's curves by step, as far as the history has them."""
    for (name, label), color in zip(panel.curves.items(), cycle(COLORS), strict=False):
        points = [(line["step"], line[name]) for line in history if name in line]
        if not points:
            continue

        # Few points are seen one by one; of many the noise is faint behind their running mean.
        steps, values = zip(*points, strict=True)
        if len(points) < SPARSE:
            axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=4, label=label, clip_on=False)
        elif panel.smooth:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
            axes.plot(steps, smooth(values, len(points) // 100), color=color, linewidth=1.8, label=label)
        else:
            axes.plot(steps, values, color=color, linewidth=1.8, label=label)
    scale_axis(axes, panel)
    style(axes, panel.title, "step", legend=len(panel.curves) > 1)


def scatter(series: Mapping[str, Sequence[Point]], title: str, xlabel: str, file: Path) -> None:
    """Draw named series of points with their labels, the points of each joined in their order."""
    from matplotlib.figure import Figure

    # Points of a series are settings of one model: the line shows what accuracy the speed costs.
    figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for (name, points), color in zip(series.items(), cycle(COLORS), strict=False):
        xs, ys, errors, labels = zip(*points, strict=True)
        axes.errorbar(xs, ys, errors, color=color, linewidth=1.5, marker="o", markersize=5, capsize=3, label=name)
        for x, y, label in zip(xs, ys, labels, strict=True):
            axes.annotate(label, (x, y), (6, 6), textcoords="offset points", fontsize=8, color=INK)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    style(axes, title, xlabel, legend=True)
    with writing(file):
        figure.savefig(file, dpi=120)


def style(axes: "Axes", title: str, xlabel: str, legend: bool) -> None:
    """Set the title, labels, grid and colours that all our figures share."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.tick_params(which="both", labelsize=9, color=FAINT, labelcolor=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color(FAINT)
    if legend:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def scale_axis(axes: "Axes", panel: Panel) -> None:
    """Set the scale of a panel's y axis: from zero where no value is below, ticks as percentages or plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif axes.get_ylim()[0] >= 0 or axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0, top=1 if panel.percent else None)
    if panel.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    else:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and its neighbours up to `reach` away, as many on either side.

    The window shrinks towards both ends, so that the first and last values stay as they are.
    """
    sums = [0.0, *accumulate(values)]  # sums[i]: of the first i values
    means = []
    for i in range(len(values)):
        n = min(reach, i, len(values) - 1 - i)
        means.append((sums[i + n + 1] - sums[i - n]) / (2 * n + 1))
    return means
