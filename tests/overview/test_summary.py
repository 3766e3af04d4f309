"""One run in a screen, also of one that was cut short, is being written, or is hardly there."""

import io
import json
from pathlib import Path

import pytest

from dirl_cli.console import PlainConsole
from dirl_cli.errors import DirlError
from dirl_cli.overview.find import run_named
from dirl_cli.overview.summary import read_run, said_words, show_summary
from tests.helpers.command_line import dirl
from tests.helpers.run_directories import RL, make_evaluation, make_run


def shown(run, width=80, terminal=False, departures=("algo=grpo", "name=a b")):
    file = io.StringIO()
    show_summary(
        read_run(run), departures, PlainConsole(file=file, width=width, force_terminal=terminal, color_system=None)
    )
    return file.getvalue()


def test_a_finished_run_says_where_its_parts_lie_and_what_to_do_with_it(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "rollouts").mkdir()
    (run / "rollouts/step-000004.jsonl").touch()
    text = shown(run)
    assert text.startswith(f"{run}: finished, dirl rl, step 4 of 4\n")
    assert f"model        {run}/model\n" in text
    assert f"checkpoints  {run}/checkpoints: 4\n" in text
    assert f"rollouts     {run}/rollouts: 1 step\n" in text
    assert "settings     algo=grpo 'name=a b'\n" in text
    assert "time         0:12: rollout 67% · backpropagation 33%\n" in text
    assert f"evaluate it  dirl eval model={run}\n" in text
    assert "greedy_accuracy  25.0 %  25.0 %  25.0 %        1\n" in text


def test_one_that_was_cut_short_says_how_to_go_on(tmp_path):
    text = shown(make_run(tmp_path / "a", steps=3, saved=2, finished=False))
    assert "goes on from step 2" in text
    assert text.endswith("go on with   dirl rl steps=4 'name=a b'\n")


def test_the_best_checkpoint_is_marked_where_one_is_kept(tmp_path):
    run = make_run(tmp_path / "a", settings=RL | {"keep_best": "greedy_accuracy"})
    better = run / "checkpoints/step-000002"
    better.mkdir()
    (better / "SHA256SUMS").touch()
    (better / "state.json").write_text(json.dumps({"measured": {"greedy_accuracy": 0.5}}))
    assert "checkpoints: 2 (best), 4" in shown(run)


def test_an_evaluation_shows_its_card(tmp_path):
    text = shown(make_evaluation(tmp_path / "a"))
    assert "dirl eval, 4 answers of 4" in text and "accuracy            75.0 %" in text


@pytest.mark.parametrize("width", [60, 80])
def test_a_terminal_gets_no_line_that_is_wider_but_for_the_command_to_copy(here, width):
    *lines, command = shown(make_run(Path("a")), width, terminal=True).splitlines()
    assert max(map(len, lines)) <= width
    assert command.endswith("dirl eval model=a")


def test_hardly_anything_is_enough(tmp_path):
    run = make_run(tmp_path / "a", steps=0, saved=0, finished=False)
    (run / "environment.json").write_text('{"command": "dirl \'", "packages": [1], "git": 3}')
    assert shown(run).endswith("go on with   the command that began it\n")
    (run / "config.yaml").write_text("[")
    assert shown(run).startswith(f"{run}: unreadable, of no command that is known\n")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("/v/bin/python3 /v/bin/dirl rl 'name=a b'", ["rl", "name=a b"]),
        ("python -m dirl_cli.cli.worker run rl runs/a", []),
        ("dirl 'open", []),
    ],
)
def test_the_words_are_those_behind_dirl(command, words):
    assert said_words({"command": command}) == words


def test_a_run_is_named_by_its_path_by_its_name_in_runs_or_by_a_path_within_it(here):
    make_run(Path("runs/rl/a"))
    for name in ("runs/rl/a", "rl/a", "runs/rl/a/model", "runs/rl/a/checkpoints/step-000004"):
        assert run_named(name) == Path("runs/rl/a")
    with pytest.raises(DirlError, match=r"did you mean rl/a\?"):
        run_named("rl/b")
    with pytest.raises(DirlError, match="dirl runs runs/rl lists"):
        run_named("runs/rl")


def test_show_is_a_command(here):
    make_run(Path("runs/rl/a"))
    assert "step 4 of 4" in dirl("runs", "show", "rl/a").output
    refused = dirl("runs", "show", "b")
    assert refused.exit_code == 1 and refused.stderr.startswith("dirl runs: b is no run")
