"""Curves as SVG that takes its colours from the page it stands in, light or dark."""

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, floor, isclose, log10

from dirl_cli.overview.curves import points_of
from dirl_cli.overview.files import Numbers
from dirl_cli.report.plot import SPARSE, Panel, smooth

WIDTH = 520
HEIGHT = 220
LEFT = 52  # of the axes, for the labels of their ticks; likewise below
BELOW = 22
ABOVE = 8
RIGHT = 12
MOST_TICKS = 7
TINY = 1e-200  # below it values are drawn as zero
MOST_POINTS = 400  # of a curve: more than there are pixels for say nothing
Point = tuple[float, float]
Place = Callable[[Point], Point]  # from step and value to where that is in the picture


def chart(panel: Panel, history: Sequence[Numbers]) -> str:
    """The curves of a panel over the steps of a run; "" where nothing of it was measured."""
    curves = {}
    values: list[float] = []
    for name, label in panel.curves.items():
        if points := points_of(history, name):
            curves[label] = points
            values += [y for _, y in points]
    if not curves:
        return ""
    is_log = panel.log and min(values) > 0
    last_step = max(points[-1][0] for points in curves.values())
    ticks = ticks_of(values, is_log, panel.percent)
    low, high = scaled(ticks[0], is_log), scaled(ticks[-1], is_log)

    def place(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / max(last_step, 1)
        share = (scaled(point[1], is_log) - low) / (high - low)
        return round(x, 1), round(HEIGHT - BELOW - (HEIGHT - BELOW - ABOVE) * share, 1)

    parts = [grid(ticks, place, last_step, panel.percent)]
    for i, points in enumerate(curves.values()):
        parts.append(curve(points, f"c{i % 5}", panel.smooth, place))
    legend = "".join(f'<span class="c{i % 5}">{escape(label)}</span>' for i, label in enumerate(curves))
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}">{"".join(parts)}</svg>'
    )
    return f"<figure><figcaption>{escape(panel.title)} <small>{legend}</small></figcaption>{picture}</figure>"


def curve(points: Sequence[Point], colour: str, is_smoothed: bool, place: Place) -> str:
    """A curve; of many points the noise is faint behind their running mean, and few are marked one by one."""
    steps = [x for x, _ in points]
    values = [y for _, y in points]
    if len(points) < SPARSE:
        dots = "".join('<circle cx="{}" cy="{}" r="2.5"/>'.format(*place(point)) for point in points)
        return f'<g class="{colour}">{line(points, place, "mean")}<g class="dots">{dots}</g></g>'
    if not is_smoothed:
        return f'<g class="{colour}">{line(sparser(points), place, "mean")}</g>'
    mean = list(zip(steps, smooth(values, len(points) // 100), strict=True))
    return f'<g class="{colour}">{line(sparser(points), place, "noise")}{line(sparser(mean), place, "mean")}</g>'


def line(points: Sequence[Point], place: Place, kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join("{},{}".format(*place(point)) for point in points)}"/>'


def sparser(points: Sequence[Point]) -> Sequence[Point]:
    """Every so many of the points, the last one included."""
    stride = ceil(len(points) / MOST_POINTS)
    return [*points[:-1:stride], points[-1]]


def grid(ticks: Sequence[float], place: Place, last_step: float, is_percent: bool) -> str:
    """Lines at the ticks of the values, and the labels of both axes."""
    parts = []
    for tick in ticks:
        _, y = place((0, tick))
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{tick_text(tick, is_percent)}</text>')
    for share, anchor in ((0, "middle"), (0.5, "middle"), (1, "end")):
        step = last_step * share
        x, _ = place((step, ticks[0]))
        parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:.0f}</text>')
    return f'<g class="grid">{"".join(parts)}</g>'


def scaled(value: float, is_log: bool) -> float:
    return log10(value) if is_log else value


def tick_text(value: float, is_percent: bool) -> str:
    return f"{100 * value:.4g} %" if is_percent else f"{value:,.6g}"


def ticks_of(values: Sequence[float], is_log: bool, is_percent: bool) -> list[float]:
    """Round numbers that enclose the values, from zero where none of them is below; two at least."""
    low, high = min(values), max(values)
    if is_log:
        exponents = range(floor(log10(low)), ceil(log10(high)) + 1)
        rounded = [mantissa * 10.0**exponent for exponent in exponents for mantissa in (1, 2, 5)]
        below = max((tick for tick in rounded if tick <= low), default=rounded[0])
        above = min((tick for tick in rounded if tick >= high and tick > below), default=10 * below)
        ticks = sorted({tick for tick in (*rounded, above) if below <= tick <= above})
        if len(ticks) > MOST_TICKS:  # then the ends and the powers of ten alone
            powers = [tick for tick in ticks[1:-1] if isclose(log10(tick), round(log10(tick)), abs_tol=1e-9)]
            ticks = [below, *powers[:: ceil(len(powers) / (MOST_TICKS - 2))], above]
        return ticks
    low = min(low, 0.0)
    if is_percent:
        high = max(high, low + 0.01)
    spread = high - low
    step = round_step(spread / 4 if spread > TINY else 0.25)
    first, last = floor(low / step), max(ceil(high / step - 1e-9), floor(low / step) + 1)
    return [step * i for i in range(first, last + 1)]


def round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** floor(log10(step))
    return next(mantissa * power for mantissa in (1, 2, 5, 10) if mantissa * power >= step * (1 - 1e-9))
