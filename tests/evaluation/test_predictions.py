"""Answers that exist already: graded in the order of their file, mistakes named by line, nothing written before."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dirl_cli.cli.app import app
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.answers import GradedAnswer
from dirl_cli.evaluation.predictions import read_predictions, regraded
from dirl_cli.reward.grading import Grader
from dirl_cli.types import Problem

PROBLEMS = [Problem("p-0", "1+1?", "2"), Problem("p-1", "1/2?", "\\frac{1}{2}"), Problem("p-2", "Who?", "me")]
BENCH = [{"question": problem.question, "ground_truth_answer": problem.answer} for problem in PROBLEMS]


def box(index: int, answer: str) -> dict[str, object]:
    return {"index": index, "completion": f"So it is $\\boxed{{{answer}}}$."}


def grade(lines: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of grading these lines."""
    Path("bench.json").write_text(json.dumps(BENCH))
    Path("mine.jsonl").write_text(lines)
    words = ["eval", "predictions=mine.jsonl", "bench.path=bench.json", "out=out", "grade_workers=1"]
    result = CliRunner().invoke(app, words, env={"HYDRA_FULL_ERROR": "0"})
    return result.exit_code, result.stdout, result.stderr


def jsonl(*lines: object) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_predictions_are_graded_in_the_order_of_their_file(here: Path) -> None:
    lines = [box(2, "me"), box(0, "3"), box(1, "0.5"), box(0, "2"), box(2, "you"), box(1, "2")]
    code, shown, _ = grade(jsonl(*lines))
    assert code == 0
    verdicts = [json.loads(line) for line in (here / "out/graded.jsonl").read_text().splitlines()]
    assert verdicts == [
        {"index": line["index"], "correct": correct, "credit": float(correct)}
        for line, correct in zip(lines, [True, False, True, True, False, False], strict=True)
    ]
    answers = [json.loads(line) for line in (here / "out/answers.jsonl").read_text().splitlines()]
    assert [(one["question"], one["reference"], one["extracted"]) for one in answers[1:3]] == [
        ("1+1?", "2", "3"),
        ("1/2?", "\\frac{1}{2}", "0.5"),
    ]
    metrics = json.loads((here / "out/eval_card.json").read_text())["metrics"]
    assert (metrics["accuracy"], metrics["pass_at"]["2"], metrics["majority"]) == (0.5, 1.0, 0.5)
    assert metrics["length"] is metrics["tokens_per_forward"] is None
    assert "avg@2" in shown and "tok/fwd" not in shown and "6 answers graded in" in shown


def test_several_programs_for_a_problem_have_no_majority(here: Path) -> None:
    rows = [{"question": "Write one().", "tests": ["assert one() == 1"]}]
    Path("programs.json").write_text(json.dumps(rows))
    programs = ["def one(): return 1", "one = lambda: 1", "def one(): pass"]
    Path("mine.jsonl").write_text(jsonl(*[{"index": 0, "completion": program} for program in programs]))
    words = ["eval", "predictions=mine.jsonl", "bench.path=programs.json", "out=out", "grade_workers=1"]
    shown = CliRunner().invoke(app, words, env={"HYDRA_FULL_ERROR": "0"}).stdout
    metrics = json.loads((here / "out/eval_card.json").read_text())["metrics"]
    assert (metrics["accuracy"], metrics["pass_at"]["2"], metrics["majority"]) == (pytest.approx(2 / 3), 1.0, None)
    assert "pass@3" in shown and "maj@3" not in shown


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "mine.jsonl holds no rows"),
        (jsonl(box(0, "2"), {"completion": "2"}), "mine.jsonl line 2: index must be a whole number from 0 to 2,"),
        (jsonl({"index": 3, "completion": ""}), "line 1: index must be a whole number from 0 to 2,"),
        (jsonl({"index": -1, "completion": ""}), "not -1"),
        (jsonl({"index": True, "completion": ""}), "not true"),
        (jsonl({"index": "1", "completion": ""}), 'not "1"'),
        (jsonl({"index": 1}), "completion must be the text of an answer, and is missing"),
        (jsonl({"index": 1, "completion": None}), "completion must be the text of an answer, not null"),
        (jsonl(box(0, "2")) + '{"index": 1, "comp\n', "mine.jsonl line 2 is not valid JSON"),
        ("3\n", "mine.jsonl line 1 is not a JSON object but 3"),
    ],
)
def test_a_mistake_is_told_by_its_line_before_anything_is_graded(here: Path, lines: str, sentence: str) -> None:
    assert grade(jsonl(box(0, "2")))[0] == 0
    before = (here / "out/graded.jsonl").read_text()
    code, _, told = grade(lines)
    assert code == 1 and sentence in told and len(told.splitlines()) == 1
    assert (here / "out/graded.jsonl").read_text() == before


def test_problems_without_a_prediction_are_counted_and_do_not_count(here: Path) -> None:
    code, shown, _ = grade(jsonl(box(0, "2")))
    assert code == 0 and "2 of 3 problems have no answer in the file and do not count" in shown
    assert json.loads((here / "out/eval_card.json").read_text())["metrics"]["accuracy"] == 1.0


def test_of_several_processes_the_first_alone_grades_and_writes(here: Path, monkeypatch) -> None:
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        code, shown, _ = grade(jsonl(box(0, "2")))
        assert code == 0 and (here / "out/graded.jsonl").exists() == bool(shown) == (rank == 0)


def test_our_own_answers_are_graded_anew_and_stay_wrong_where_they_were_cut_off() -> None:
    whole = GradedAnswer("p-0", 0, "\\boxed{2}", False, "stop", 3, 4, 2, 2, 0.1)
    cut = GradedAnswer("p-0", 1, "\\boxed{2} and", False, "length", 3, 4, 2, 2, 0.1)
    read = read_predictions([("line 1", asdict(whole)), ("line 2", asdict(cut))], PROBLEMS)
    why = {"question": "1+1?", "reference": "2", "extracted": "2"}
    assert read == [replace(whole, **why), replace(cut, **why)]
    old = {
        key: value for key, value in asdict(whole).items() if key not in (*why, "credit")
    }  # as earlier versions wrote it
    assert read_predictions([("line 1", old)], PROBLEMS) == read[:1]
    with Grader(1, 30.0) as grader:
        assert {answer.sample: answer.correct for answer in regraded(read, PROBLEMS, grader)} == {0: True, 1: False}
    with pytest.raises(DirlError, match="line 1 answers problem p-0, which the benchmark has not"):
        read_predictions([("line 1", asdict(whole))], PROBLEMS[1:])


def test_answers_to_one_problem_are_numbered_as_they_come() -> None:
    read = read_predictions([("", box(1, "a")), ("", box(0, "b")), ("", box(1, "c"))], PROBLEMS)
    assert [(answer.problem, answer.sample) for answer in read] == [("p-1", 0), ("p-0", 0), ("p-1", 1)]


def test_grading_answers_imports_neither_torch_nor_transformers(here: Path) -> None:
    (here / "bench.json").write_text(json.dumps(BENCH))
    (here / "mine.jsonl").write_text(jsonl(box(0, "2")))
    code = (
        "import sys; from typer.testing import CliRunner; from dirl_cli.cli.app import app\n"
        "words = ['eval', 'predictions=mine.jsonl', 'bench.path=bench.json', 'out=out']\n"
        "assert CliRunner().invoke(app, words).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'accelerate') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
