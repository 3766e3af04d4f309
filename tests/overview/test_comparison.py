"""Runs side by side, as many as there is room for; what is alike is not told."""

import io
from pathlib import Path

import pytest
from PIL import Image

from dirl_cli.console import PlainConsole
from dirl_cli.errors import DirlError
from dirl_cli.overview.comparison import blocks_of, labels_of, settings_apart, show_side_by_side
from dirl_cli.overview.summary import read_run
from tests.helpers.command_line import dirl
from tests.helpers.run_directories import RL, STEP, make_evaluation, make_run


@pytest.fixture
def runs(here):
    names = ("first", "second-of-a-longer-name", "third")
    for seed, name in enumerate(names):
        make_run(Path("runs/rl", name), settings=RL | {"seed": seed}, metrics=STEP | {"reward": 0.5 + seed / 10})
    return [Path("runs/rl", name) for name in names]


def shown(runs, width=80, terminal=True):
    file = io.StringIO()
    console = PlainConsole(file=file, width=width, force_terminal=terminal, color_system=None)
    show_side_by_side([read_run(run) for run in runs], console)
    return file.getvalue().splitlines()


def test_a_pipe_gets_a_column_a_run_with_what_differs(runs):
    table = {line.split()[0]: line.split()[1:] for line in shown(runs, terminal=False) if line}
    assert table["first"] == ["second-of-a-longer-name", "third"]
    assert table["seed"] == ["0", "1", "2"]
    assert table["reward"] == ["0.5", "0.6", "0.7"]
    assert table["greedy_accuracy"] == ["25.0", "%"] * 3
    assert "model.path" not in table and "loss" not in table


@pytest.mark.parametrize("width", [40, 52, 80])
def test_a_narrow_terminal_gets_some_runs_below_the_others(runs, width):
    lines = shown(runs, width)
    assert max(map(len, lines[:-1])) <= width and not any("…" in line for line in lines)
    assert len([line for line in lines if line.startswith("seed")]) == {40: 3, 52: 2, 80: 1}[width]


def test_blocks_are_filled_in_order():
    widths = {"a": 10, "b": 10, "c": 25}
    assert blocks_of("abc", widths, 20) == [["a", "b"], ["c"]]  # one that is too wide stands alone
    assert blocks_of("abc", widths, 45) == [["a", "b", "c"]]


def test_labels_are_what_paths_do_not_share():
    assert labels_of([Path("runs/rl/a"), Path("runs/rl/b")]) == ["a", "b"]
    assert labels_of([Path("runs/rl/a"), Path("runs/rl/a/seed=1")]) == ["runs/rl/a", "seed=1"]
    with pytest.raises(DirlError, match="twice"):
        labels_of([Path("a"), Path("./a")])


def test_settings_that_differ_are_told_but_not_what_follows_from_them():
    a = {
        "masking": {"_target_": "m.A", "of_a": 1},
        "name": "a",
        "optim": {"lr": 1, "eps": 2, "weight_decay": 0},
        "data": {"path": "x" * 99},
    }
    b = {
        "masking": {"_target_": "m.B", "of_b": 1},
        "name": "b",
        "optim": {"lr": 2.0, "weight_decay": 0.0},
        "data": {"path": "y"},
    }
    assert settings_apart([a, b]) == [
        ("masking", ["A", "B"]),
        ("optim.lr", ["1", "2"]),
        ("optim.eps", ["2", ""]),
        ("data.path", ["…" + "x" * 29, "y"]),
    ]
    # Of another command only what both have.
    assert [key for key, _ in settings_apart([a, b | {"rl": {}}])] == ["masking", "optim.lr", "data.path"]


def test_curves_are_drawn_where_they_are_asked_for(runs):
    names = [str(run) for run in runs[:2]]
    result = dirl("runs", "compare", *names, "--plot", "pictures/curves.png")
    assert result.exit_code == 0 and "pictures/curves.png" in result.output
    assert Image.open("pictures/curves.png").size[0] > 800
    assert "ends in .png" in dirl("runs", "compare", *names, "--plot", "curves.txt").stderr
    Path("file").touch()
    refused = dirl("runs", "compare", *names, "--plot", "file/curves.png")
    assert refused.exit_code == 1 and refused.stderr.endswith("): give another file with --plot\n")
    make_evaluation(Path("runs/eval/e"))
    make_evaluation(Path("runs/eval/f"))
    refused = dirl("runs", "compare", "eval/e", "eval/f", "--plot", "a.png")
    assert refused.exit_code == 1 and "metrics by step" in refused.stderr


def test_runs_of_different_commands_and_hardly_begun_ones_stand_side_by_side(runs):
    make_evaluation(Path("runs/eval/e"))
    make_run(Path("runs/sft/s"), steps=0, saved=0, settings={"masking": {}, "model": {}, "steps": 9}, finished=False)
    result = dirl("runs", "compare", "rl/first", "eval/e", "sft/s")
    assert result.exit_code == 0 and "75.0 %" in result.output
    assert dirl("runs", "compare", "rl/first").exit_code == 1
