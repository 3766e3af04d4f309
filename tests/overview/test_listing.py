"""The table of runs: as many columns as there is room for, and never a number that is cut."""

import io
import time
from pathlib import Path

import pytest

from dirl_cli.console import PlainConsole
from dirl_cli.overview.listing import ago, show_runs
from dirl_cli.overview.status import RunStatus
from tests.helpers.command_line import dirl
from tests.helpers.run_directories import make_evaluation, make_run

METRICS = {"reward": 0.12345, "greedy_accuracy": 0.987, "length": 123.4, "tokens_per_forward": 3.456}
NAMES = ("rl/short", "rl/a-name-of-some-length/with=overrides,seed=1")


def lines(width, terminal=True, colours=None):
    now = time.time()
    runs = [
        RunStatus(Path("runs", NAMES[0]), "rl", "running", 12, 1200, METRICS, 3700.0, now - 5),
        RunStatus(Path("runs", NAMES[1]), "rl", "stopped", 12, 1200, METRICS, None, now - 7300),
    ]
    file = io.StringIO()
    console = PlainConsole(file=file, width=width, force_terminal=terminal, color_system=colours)
    show_runs(runs, Path("runs"), console)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_no_line_of_the_table_is_wider_than_the_terminal_and_no_number_is_cut(width):
    table = lines(width)[:-2] if width < 120 else lines(width)[:-1]
    assert all(len(line) <= width for line in table)
    shown = " ".join(table).split()
    assert "12/1200" in shown and "running" in shown
    for word in shown:
        assert "…" not in word
    assert ("98.7" in shown) == ("accuracy" in shown)


def test_a_pipe_gets_every_column_in_one_line_a_run_without_colours():
    head, older, newer, summary = lines(40, terminal=False, colours="auto")
    assert head.split() == [
        "run",
        "command",
        "state",
        "step",
        "reward",
        "accuracy",
        "%",
        "length",
        "tok/fwd",
        "left",
        "last",
    ]
    assert older.split() == [NAMES[1], "rl", "stopped", "12/1200", "0.123", "98.7", "123", "3.46", "2", "h", "ago"]
    assert newer.split() == [NAMES[0], "rl", "running", "12/1200", "0.123", "98.7", "123", "3.46", "1:01:40", "now"]
    assert summary == "2 runs: 1 stopped, 1 running"


def test_what_a_narrow_terminal_leaves_out_is_said():
    table, remark = lines(60)[0], lines(60)[-1]
    for column in ("command", "reward", "length", "tok/fwd", "left", "last"):
        assert (column in table) != (column in remark)
    assert "wider" not in lines(160)[-1]


def test_the_past_is_told_in_its_largest_unit():
    assert [ago(seconds) for seconds in (5, 61, 7300, 200_000)] == ["now", "1 min ago", "2 h ago", "2 d ago"]
    assert ago(3599) == "59 min ago" and ago(86_399) == "23 h ago"


def test_runs_lists_what_is_in_runs_or_in_directories(here):
    assert "no runs yet" in dirl("runs").output
    make_run(Path("runs/rl/a"))
    make_evaluation(Path("elsewhere/b"), answers=1, finished=False)
    assert "rl/a" in dirl("runs").output
    listed = dirl("runs", "elsewhere").output
    assert listed.splitlines()[1].split()[:4] == ["b", "eval", "stopped", "1/4"]
    assert "2 runs" in dirl("runs", "runs", "elsewhere").output
    refused = dirl("runs", "nowhere")
    assert refused.exit_code == 1
    assert refused.stderr == (
        "dirl runs: nowhere is no directory: give one that holds runs, or a command (show, compare, report)\n"
    )
    Path("empty").mkdir()
    assert dirl("runs", "empty").exit_code == 0
