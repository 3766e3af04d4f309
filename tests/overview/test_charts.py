"""Curves as SVG: round ticks that enclose them, points within the axes, as many as can be seen."""

import re

import pytest

from dirl_cli.overview.charts import BELOW, HEIGHT, LEFT, MOST_POINTS, MOST_TICKS, RIGHT, WIDTH, chart, ticks_of
from dirl_cli.report.plot import Panel


@pytest.mark.parametrize(
    ("values", "is_log", "ticks"),
    [
        ([0.1, 0.93], False, [0, 0.5, 1.0]),
        ([3.0, 3.0], False, [0, 1, 2, 3]),
        ([0.0], False, [0, 0.5]),
        ([-2.0, 7.0], False, [-5, 0, 5, 10]),
        ([0.03, 0.4], True, [0.02, 0.05, 0.1, 0.2, 0.5]),
        ([2.0, 2.0], True, [2, 5]),
        ([1e-6, 1.0], True, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values, is_log, ticks):
    found = ticks_of(values, is_log, is_percent=False)
    assert found[0] <= min(values) and found[-1] >= max(values) and 2 <= len(found) <= MOST_TICKS
    if ticks != [0, 0.5, 1.0]:
        assert found == pytest.approx(ticks)


def points(svg):
    return [
        tuple(map(float, pair.split(","))) for line in re.findall(r'points="([^"]+)"', svg) for pair in line.split()
    ]


def test_a_curve_stays_within_its_axes_and_ends_where_the_run_does():
    history = [{"step": step, "loss": 10 / step} for step in range(1, 2001)]
    for log in (False, True):
        svg = chart(Panel("Loss", {"loss": "training"}, log=log, smooth=False), history)
        drawn = points(svg)
        assert len(drawn) <= MOST_POINTS + 1
        assert all(LEFT <= x <= WIDTH - RIGHT and 0 <= y <= HEIGHT - BELOW for x, y in drawn)
        assert drawn[-1][0] == WIDTH - RIGHT


def test_few_points_are_marked_and_the_noise_of_many_is_faint():
    few = chart(Panel("A", {"a": "x"}), [{"step": i, "a": i} for i in range(1, 4)])
    assert few.count("<circle") == 3 and "noise" not in few
    many = chart(Panel("A", {"a": "x"}), [{"step": i, "a": i % 2} for i in range(1, 400)])
    assert "<circle" not in many and 'class="noise"' in many and 'class="mean"' in many


def test_what_was_not_measured_or_cannot_be_logarithmic_is_no_failure():
    assert chart(Panel("A", {"a": "x"}), [{"step": 1, "b": 2}]) == ""
    assert "<svg" in chart(Panel("A", {"a": "x"}, log=True), [{"step": 0, "a": 0.0}])
    assert "&lt;x&gt;" in chart(Panel("A", {"a": "<x>"}), [{"step": 1, "a": 1e-300}])
