"""How a sweep of training runs ends: a table, seeds as their mean, one CSV file."""

import csv
import json
from math import sqrt
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dirl_cli.cli.app import app
from dirl_cli.commands import rl, sft

SMALL = ("data.train=40", "data.held_out=4", "data.test=4", "batch_size=8", "eval_problems=0", "device=cpu")


def run(out: Path, *history: dict[str, float]) -> Path:
    out.mkdir(parents=True)
    lines = [{"step": step, "time": 1.8e9, "seconds/rows": 0.1, **line} for step, line in enumerate(history)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def end(command, jobs: list[tuple[list[str], Path]], capsys: pytest.CaptureFixture) -> list[str]:
    """The lines that a sweep ends with, blanks as one."""
    command.after_sweep("swept", jobs)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def read(file: Path) -> list[dict[str, str]]:
    with file.open() as content:
        return list(csv.DictReader(content))


def test_each_run_is_told_by_what_it_measured_last(tmp_path, capsys):
    evaluated = {"validation_loss": 2.0, "greedy_accuracy": 0.5}
    jobs = [
        (["optim.lr=0.1"], run(tmp_path / "run/a", evaluated, {"loss": 3.0}, {"loss": 1.5, "greedy_accuracy": 0.75})),
        (["optim.lr=0.2"], run(tmp_path / "run/b", {"loss": 4.0})),
    ]
    lines = end(sft, jobs, capsys)
    assert "optim.lr loss validation loss greedy accuracy %" in lines
    assert "0.1 1.5000 2.0000 75.0" in lines and "0.2 4.0000" in lines
    assert lines[-1] == f"{tmp_path}/run/swept.csv"
    table = read(tmp_path / "run/swept.csv")
    assert table[0] == {
        "optim.lr": "0.1", "step": "2", "validation_loss": "2.0", "greedy_accuracy": "0.75", "loss": "1.5",
        "directory": f"{tmp_path}/run/a",
    }  # fmt: skip
    assert (table[1]["optim.lr"], table[1]["loss"], table[1]["greedy_accuracy"]) == ("0.2", "4.0", "")


def test_seeds_have_a_row_of_their_mean_and_its_standard_error(tmp_path, capsys):
    rewards = {("dipo", 0): 0.2, ("dipo", 1): 0.4, ("dipo", 2): 0.9, ("grpo", 0): 0.5, ("grpo", 1): 0.7}
    jobs = [
        ([f"algo={algo}", f"seed={seed}"], run(tmp_path / f"{algo}{seed}", {"reward": reward, "accuracy": 0.25}))
        for (algo, seed), reward in rewards.items()
    ]
    lines = end(rl, jobs, capsys)
    error = sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2 / 3)
    assert f"dipo, mean of 3 seeds 0.500 ± {error:.3f} 25.0" in lines
    assert "grpo, mean of 2 seeds 0.600 ± 0.100 25.0" in lines
    at = lines.index("dipo, 2 0.900 25.0")
    assert lines[at + 1].startswith("dipo, mean") and lines[at + 2] == "grpo, 0 0.500 25.0"
    assert len(read(tmp_path / "swept.csv")) == 5  # a line a run


def test_what_only_some_seeds_measured_has_no_mean(tmp_path, capsys):
    jobs = [
        (["seed=0"], run(tmp_path / "0", {"loss": 1.0, "greedy_accuracy": 0.5})),
        (["seed=1"], run(tmp_path / "1", {"loss": 3.0})),
    ]
    assert "mean of 2 seeds 2.0000 ± 1.0000" in end(sft, jobs, capsys)


@pytest.mark.timeout(300)
def test_a_sweep_over_seeds_ends_so_too(here: Path) -> None:
    words = ["sft", "-m", *SMALL, "steps=2", "seed=0,1"]
    result = CliRunner().invoke(app, words, env={"HYDRA_FULL_ERROR": "0"})
    assert result.exit_code == 0, result.stderr
    assert "mean of 2 seeds" in result.stdout
    file = here / "runs/sft/tiny-arithmetic/seed=0,1.csv"
    assert result.stdout.splitlines()[-1] == str(file.relative_to(here))
    assert [line["seed"] for line in read(file)] == ["0", "1"]
