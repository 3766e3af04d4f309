"""The embedded planning tasks from end to end: fine-tuned, reinforced, rewarded anew, evaluated."""

import json
from pathlib import Path

import pytest

from dirl_cli.commands import eval as evaluation
from dirl_cli.commands import sft
from dirl_cli.evaluation.answers import read_answers
from dirl_cli.reward.puzzles import grid_in, sudoku_credit
from dirl_cli.rollout.storage import read_rollout
from tests.helpers.rl_runs import composed, config, run, save_sharp_model

FEW = ("data.train=400", "data.held_out=20", "data.test=4", "device=cpu")


@pytest.mark.parametrize("task", ["sudoku", "countdown"])
def test_rollouts_say_how_they_are_verified_and_may_be_rewarded_anew(task: str, tmp_path: Path) -> None:
    model = save_sharp_model(tmp_path / "start")
    words = (f"data={task}", "reward=credit", "steps=1", "eval_problems=2")
    run(config(model, *words), tmp_path / "run")
    name = "rollouts/step-000001.jsonl"
    records = read_rollout(tmp_path / "run" / name)
    assert {record.problem.verifier for record in records} == {task}
    assert all(record.problem.details for record in records)
    assert {*records[0].parts} == {"accuracy", "credit", "soft_overlong"}

    run(config(model, *words, f"rl.replay={tmp_path / 'run'}", "rl.rescore=true"), tmp_path / "anew")
    again = read_rollout(tmp_path / "anew" / name)
    assert [record.parts for record in again] == [record.parts for record in records]


@pytest.mark.slow
def test_a_few_steps_fill_some_blanks_rightly_and_every_figure_says_so(tmp_path: Path) -> None:
    small = ("steps=100", "eval_every=0", "eval_problems=20", "save_every=100")
    out = tmp_path / "sft"
    out.mkdir()
    sft.run(composed("sft", "experiment=sudoku_sft", *FEW, *small, f"out={out}"), out)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["denoising_accuracy/0.5"] > 0.5

    words = ("reward=credit", "steps=1", "eval_problems=4", "rl.problems=4", "rl.group_size=4")
    words = (*words, f"model.path={out / 'model'}")
    run(composed("rl", "experiment=sudoku_rl", *FEW, *words), tmp_path / "rl")
    records = read_rollout(tmp_path / "rl" / "rollouts" / "step-000001.jsonl")
    for record in records:
        grid = grid_in(record.completion)
        credit = sudoku_credit(record.problem, grid) if grid and record.trajectory.stop_reason == "stop" else 0.0
        assert record.parts["credit"] == credit and record.correct == (credit == 1)
    assert any(0 < record.parts["credit"] < 1 for record in records)

    words = (f"model.path={out / 'model'}", "model=path", "limit=20", "device=cpu", "grade_workers=1")
    evaluation.run(composed("eval", "~experiment", "bench=sudoku", *words), tmp_path / "rl")
    answers = read_answers(tmp_path / "rl" / "answers.jsonl")
    card = json.loads((tmp_path / "rl" / "eval_card.json").read_text())
    assert card["metrics"]["credit"] == pytest.approx(sum(answer.credit or 0.0 for answer in answers) / 20)
    assert card["metrics"]["credit"] > card["metrics"]["accuracy"]
