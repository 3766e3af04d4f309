"""How a sweep of evaluations ends: one table, one CSV file, one picture."""

import csv
import json
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dirl_cli.cli.app import app
from dirl_cli.commands.eval_comparison import after_sweep
from dirl_cli.evaluation.answers import GradedAnswer
from dirl_cli.evaluation.metrics import mean_over_seeds, measure
from dirl_cli.evaluation.result_card import read_evaluation
from dirl_cli.evaluation.sweep import MEANS, Member, published, rows, series_drawn

ANSWER = GradedAnswer("a", 0, "", False, "stop", 10, 12, 6, 8, 0.5)


def card(out: Path, right: int, forwards: int, model: str = "mine", bench: str = "quiz", **more: Any) -> Path:
    """The card of an evaluation with `right` of 4 answers right, each in so many forwards."""
    answers = [replace(ANSWER, problem=str(i), correct=i < right, forwards=forwards) for i in range(4)]
    facts = {"model": {"name": model}, "bench": {"name": bench}, **more}
    out.mkdir(parents=True)
    (out / "eval_card.json").write_text(json.dumps({**facts, "metrics": asdict(measure(answers))}))
    return out


def end(jobs: list[tuple[list[str], Path]], capsys: pytest.CaptureFixture, title: str = "swept") -> list[str]:
    """The lines that a sweep ends with, blanks as one."""
    after_sweep(title, jobs)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_sweep_ends_with_a_table_a_file_and_a_picture_beside_its_directories(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    jobs = [
        (["decoding.threshold=0.5"], card(tmp_path / "run/a", 1, forwards=3)),
        (["decoding.threshold=0.9"], card(tmp_path / "run/b", 3, forwards=6)),
    ]
    lines = end(jobs, capsys)
    assert "decoding.threshold avg@1 % 95 % length tok/step tok/fwd TPF" in lines
    assert (
        "0.5 25.0 ± 25.0 4.6-69.9 10 2.00 4.00 3.33" in lines and "0.9 75.0 ± 25.0 30.1-95.4 10 2.00 2.00 1.67" in lines
    )
    assert lines[-1] == " · ".join(f"{tmp_path}/run/mine-quiz-swept.{kind}" for kind in ("csv", "json", "png"))
    with (tmp_path / "run/mine-quiz-swept.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(line["decoding.threshold"], float(line["accuracy"])) for line in table] == [("0.5", 0.25), ("0.9", 0.75)]
    assert table[0]["directory"] == f"{tmp_path}/run/a" and float(table[0]["tokens_per_forward"]) == 4
    assert (tmp_path / "run/mine-quiz-swept.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_benchmarks_shows_what_is_published_and_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    figure = {"accuracy": 83.05, "standard_errors": -0.42, "differently": {}}
    jobs = [
        (["bench=x"], card(tmp_path / "mine-x", 2, 3, bench="x", published=figure)),
        (["bench=y"], card(tmp_path / "mine-y", 2, 3, bench="y")),
        (["bench=z"], card(tmp_path / "mine-z", 2, 3, bench="z", published={**figure, "differently": {"samples": []}})),
    ]
    lines = end(jobs, capsys)
    assert "bench avg@1 % 95 % published (z) length tok/step tok/fwd TPF" in lines
    assert (
        "x 50.0 ± 28.9 15.0-85.0 83.05 (-0.4) 10 2.00 4.00 3.33" in lines
        and "y 50.0 ± 28.9 15.0-85.0 10 2.00 4.00 3.33" in lines
    )
    assert published(read_evaluation(jobs[2][1]).card) == "83.05"  # another protocol has no distance
    assert (tmp_path / "mine-swept.csv").exists()


def test_a_mixed_run_ends_in_the_mean_over_benchmarks_and_in_one_card(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    jobs = [
        (["bench=x"], card(tmp_path / "mine-x", 1, 3, bench="x")),
        (["bench=gym-y"], card(tmp_path / "mine-gym-y", 4, 3, bench="gym-y")),
    ]
    lines = end(jobs, capsys)
    assert f"mean {(25 + 100) / 2} ± {25 / 2}" in lines
    whole = json.loads((tmp_path / "mine-swept.json").read_text())
    assert [(one["overrides"], one["bench"]["name"]) for one in whole["evaluations"]] == [
        ({"bench": "x"}, "x"),
        ({"bench": "gym-y"}, "gym-y"),
    ]
    mean = whole["means_over_benchmarks"]["mean"]
    assert (mean["accuracy"], mean["standard_error"], mean["problems"]) == (0.625, 0.125, 8)
    assert mean["length"] is mean["low"] is None


def test_settings_that_were_not_tried_on_the_same_benchmarks_have_a_mean_each(tmp_path: Path) -> None:
    tried = [("x", "0.5"), ("y", "0.5"), ("x", "0.9")]
    members = [
        Member({"bench": b, "decoding.threshold": t}, read_evaluation(card(tmp_path / f"{b}{t}", 2, 3, bench=b)))
        for b, t in tried
    ]
    assert list(rows(members)) == ["x, 0.5", "y, 0.5", "x, 0.9", "0.5, mean"]


def test_a_curve_runs_through_what_was_swept_and_not_through_models_or_benchmarks(tmp_path: Path) -> None:
    points = [("x", "0.9", 6), ("x", "0.5", 3), ("y", "0.9", 4)]
    outs = [card(tmp_path / f"{bench}{t}", 1, forwards, bench=bench) for bench, t, forwards in points]
    members = [
        Member({"bench": bench, "decoding.threshold": t}, read_evaluation(out))
        for (bench, t, _), out in zip(points, outs, strict=True)
    ]
    found = series_drawn(members)
    assert {name: [(point[0], point[3]) for point in points] for name, points in found.items()} == {
        "mine on x: AUP 83.3": [(10 / 6, "0.9"), (10 / 3, "0.5")],  # in order of speed
        "mine on y": [(2.5, "0.9")],
    }
    assert list(rows(members)) == ["x, 0.9", "x, 0.5", "y, 0.9", "0.9, mean"]


def test_evaluations_with_different_numbers_of_samples_share_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    jobs = [(["samples=1"], card(tmp_path / "a", 2, 3)), (["samples=2"], card(tmp_path / "b", 2, 3))]
    several = json.loads((tmp_path / "b/eval_card.json").read_text())
    several["metrics"] |= {"pass_at": {"1": 0.5, "2": 0.75}, "majority": 0.5}
    (tmp_path / "b/eval_card.json").write_text(json.dumps(several))
    lines = end(jobs, capsys)
    assert "samples avg@k % 95 % pass@k maj@k length tok/step tok/fwd TPF" in lines
    assert "2 50.0 ± 28.9 15.0-85.0 75.0 50.0 10 2.00 4.00 3.33" in lines


def test_seeds_have_a_row_of_their_mean_and_its_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    right = {("0.5", 0): 1, ("0.5", 1): 2, ("0.5", 2): 3, ("0.9", 0): 4, ("0.9", 1): 4}
    jobs = [
        ([f"decoding.threshold={t}", f"seed={seed}"], card(tmp_path / f"{t}-{seed}", n, forwards=3 + seed))
        for (t, seed), n in right.items()
    ]
    lines = end(jobs, capsys)
    error = 100 * sqrt((0.25**2 + 0 + 0.25**2) / 2 / 3)
    at = lines.index("0.5, 2 75.0 ± 25.0 30.1-95.4 10 2.00 2.40 2.00")
    assert lines[at + 1] == f"0.5, mean of 3 seeds 50.0 ± {error:.1f} 10 2.00 {(4 + 3 + 2.4) / 3:.2f} 2.61"
    assert "0.9, mean of 2 seeds 100.0 10 2.00 3.50 2.92" in lines  # of what does not vary, nothing tells the error
    assert MEANS in lines
    with (tmp_path / "mine-quiz-swept.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5  # a line an evaluation


def test_what_one_seed_does_not_know_has_no_mean() -> None:
    sampled = measure([ANSWER, replace(ANSWER, problem="b", correct=True)])
    mean = mean_over_seeds([sampled, replace(sampled, accuracy=1.0, length=None, tokens_per_forward=3.0)])
    assert (mean.accuracy, mean.standard_error, mean.answers) == (0.75, pytest.approx(0.25), 4)
    assert (mean.length, mean.tokens_per_forward, mean.low, mean.high) == (None, 2.25, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_of_the_tiny_model_ends_so_too(here: Path, launcher: str) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra `launchers` is not installed")
    words = ["eval", "-m", f"hydra/launcher={launcher}", "limit=2", "decoding.max_new_tokens=4"]
    for steps in ("2,4", "4,0,2"):  # the second time only a mistake is new
        result = CliRunner().invoke(app, [*words, f"decoding.denoising_steps={steps}"], env={"HYDRA_FULL_ERROR": "0"})
    assert result.exit_code == 1 and "not every run of it succeeded" in result.stderr
    with (here / "runs/eval/tiny-arithmetic/decoding.denoising_steps=4,0,2.csv").open() as file:
        assert [line["decoding.denoising_steps"] for line in csv.DictReader(file)] == ["4", "2"]
    assert not list((here / "runs/eval").glob(".sweep*"))
