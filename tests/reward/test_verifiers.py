"""A problem says how it is verified, and every way to an answer's reward or verdict heeds it."""

import multiprocessing

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.evaluation.predictions import read_predictions, regraded
from dirl_cli.reward.grading import Grader
from dirl_cli.reward.rewards import Answer
from dirl_cli.reward.scoring import RewardComputer, RewardSettings
from dirl_cli.types import Problem

SOLUTION = "1234341221434321"
HALF = "2234341221434321"
SUDOKU = Problem("s", "", SOLUTION, verifier="sudoku", details={"puzzle": "0034341221434321"})
GAME = Problem("c", "", "(3+5)*7", verifier="countdown", details={"numbers": [3, 5, 7], "target": 56})
SUM = Problem("m", "", "56")
PROBLEMS = [SUDOKU, GAME, SUM]


def test_answers_of_all_kinds_are_graded_together_and_puzzles_start_no_process() -> None:
    items = [("whole", SUDOKU, SOLUTION), ("half", SUDOKU, HALF), ("game", GAME, "7*(3+5)"), ("missed", GAME, "3+5+7")]
    items += [("sum", SUM, r"\boxed{56.0}"), ("expression", SUM, "7*(3+5)"), ("nothing", SUDOKU, "?")]
    with Grader(workers=1) as grader:
        credits = dict(grader.grade(items))
        assert multiprocessing.active_children() == []
    expected = {"whole": 1, "half": 0.5, "game": 1, "missed": 0.1, "sum": 1, "expression": 0, "nothing": 0}
    assert credits == expected


def test_partial_credit_is_a_reward_and_not_correct() -> None:
    completions = {"whole": SOLUTION, "half": HALF, "cut off": SOLUTION}
    answers = [(key, Answer(SUDOKU, text, 16, key == "cut off", 2.0, 32, 4)) for key, text in completions.items()]
    with RewardComputer(RewardSettings({"credit": 1.0, "accuracy": 0.0}, workers=1)) as computer:
        results = {key: (result.total, result.correct) for key, result in computer.compute(answers)}
    assert results == {"whole": (1, True), "half": (0.5, False), "cut off": (0, False)}


def test_predictions_are_graded_by_their_problem_and_show_what_was_read() -> None:
    texts = [f"It is {HALF}", "7*(3+5) = 56", r"\boxed{56}"]
    lines = [(f"line {i}", {"index": i, "completion": text}) for i, text in enumerate(texts)]
    answers = read_predictions(lines, PROBLEMS)
    assert [answer.extracted for answer in answers] == [HALF, "7*(3+5)", "56"]
    with Grader(workers=1) as grader:
        credits = {answer.problem: (answer.correct, answer.credit) for answer in regraded(answers, PROBLEMS, grader)}
    assert credits == {"s": (False, 0.5), "c": (True, 1), "m": (True, 1)}


def test_a_verifier_that_is_not_there_is_named() -> None:
    with Grader(workers=1) as grader, pytest.raises(DirlError, match=r"problem s: no verifier .* did you mean sudoku"):
        grader.submit("key", Problem("s", "", "1", verifier="soduku"), "1")
