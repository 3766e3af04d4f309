"""Rows that say how they are graded: choices, short text, and functions of the user's own."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dirl_cli.data.files import ProblemFile, TrainingFile
from dirl_cli.errors import DirlError
from dirl_cli.reward.custom_scorer import find_scorer
from dirl_cli.reward.grading import Grader
from dirl_cli.reward.rewards import Answer
from dirl_cli.reward.scoring import RewardComputer, RewardSettings
from dirl_cli.types import Problem

SCORER = '''
import time

def words(problem, answer):
    """The share of the words asked for that are there."""
    wanted = problem.details["words"]
    return sum(word in answer for word in wanted) / len(wanted)

def slow(problem, answer):
    time.sleep(60)

def broken(problem, answer):
    raise KeyError("colour")

def text(problem, answer):
    return "good"

def large(problem, answer):
    return 2

def huge(problem, answer):
    return 10**400

def one(problem, answer):
    return "1"

def leaving(problem, answer):
    raise SystemExit(1)
'''


@pytest.fixture
def scorers(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with my_scorers.py in it, on Python's path as the command line puts it."""
    (here / "my_scorers.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(here))
    yield here
    sys.modules.pop("my_scorers", None)
    find_scorer.cache_clear()


def problems(rows: list[dict[str, Any]], **settings: Any) -> list[Problem]:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ProblemFile("mine", "rows.jsonl", **settings).problems()


def test_a_choice_is_put_with_its_options_in_the_layouts_of_known_benchmarks(here: Path) -> None:
    texts = ["London", "Paris"]
    rows = [
        {"question": "Capital?", "options": texts, "ground_truth_answer": "B"},
        {"question": "Capital?", "choices": texts, "answer": 1},  # MMLU
        {"question": "Capital?", "choices": {"label": ["A", "B"], "text": texts}, "answer": "B"},  # ARC
        {"question": "Capital?", "options": json.dumps(texts), "answer": "Paris"},  # as a table spells it
        {"question": "Capital?\nA. London\nB. Paris", "options": texts, "answer": "B"},  # which holds them already
    ]
    read = problems(rows, verifier="choice")
    assert {problem.question for problem in read} == {"Capital?\nA. London\nB. Paris"}
    assert [problem.answer for problem in read] == ["B", "B", "B", "Paris", "B"]
    assert all(problem.details == {"options": {"A": "London", "B": "Paris"}} for problem in read)
    with Grader(workers=1) as grader:
        assert dict(grader.grade((i, problem, "Answer: B") for i, problem in enumerate(read))) == dict.fromkeys(
            range(5), 1
        )


def test_a_choice_without_an_answer_has_nothing_to_be_graded_by(here: Path) -> None:
    (problem,) = problems([{"question": "?", "options": ["a", "b"], "ground_truth_answer": None}], verifier="choice")
    assert not problem.is_gradable


def test_short_text_takes_aliases_and_further_answers(here: Path) -> None:
    rows = [
        {"question": "Who?", "answer": "Bob", "aliases": ["Robert"], "verifier": "text"},
        {"question": "Who?", "answer": ["Bob", "Robert"], "verifier": "text"},
        {"question": "Who?", "answer": {"value": "Bob", "aliases": ["Robert"]}, "verifier": "text"},  # TriviaQA
        {"question": "1+1?", "answer": "2"},  # beside them, mathematics
    ]
    read = problems(rows)
    assert [(problem.answer, problem.verifier) for problem in read] == [("Bob", "text")] * 3 + [("2", "math")]
    assert [problem.details for problem in read] == [{"aliases": ["Robert"]}] * 3 + [{}]


def test_a_row_of_a_puzzle_gives_the_details_its_verifier_needs(here: Path) -> None:
    game = {"numbers": [3, 5, 7], "target": 56}
    (problem,) = problems([{"question": "3 5 7 = 56", "answer": "(3+5)*7", "verifier": "countdown", "details": game}])
    assert problem.details == game
    with Grader(workers=1) as grader:
        assert dict(grader.grade([(0, problem, "7*(3+5)"), (1, problem, "3+5+7")])) == {0: 1, 1: 0.1}


def test_a_scorer_of_ones_own_is_given_the_row_and_needs_no_answer(scorers: Path) -> None:
    (problem,) = problems([{"question": "Red and blue?", "words": ["red", "blue"]}], verifier="my_scorers.words")
    assert problem.details == {"question": "Red and blue?", "words": ["red", "blue"]}
    assert problem.is_gradable and problem.answer == ""
    with Grader(workers=1) as grader:
        credits = dict(
            grader.grade([(0, problem, "red, blue"), (1, problem, "blue"), (2, problem, ""), (3, problem, "?")])
        )
    assert credits == {0: 1, 1: 0.5, 2: 0, 3: 0}


def test_a_scorer_of_ones_own_rewards_training_too_and_its_rows_are_held_out(scorers: Path) -> None:
    rows = [{"question": f"Red {i}?", "words": ["red", "blue"]} for i in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TrainingFile("rows.jsonl", "mine", held_out=1, verifier="my_scorers.words")
    training = data.training_problems()
    assert len(training) == 3 and len(data.problems()) == 1
    answers = [(i, Answer(training[0], text, 4, False, 2.0, 32, 4)) for i, text in enumerate(["red", "red blue"])]
    with RewardComputer(RewardSettings({"credit": 1.0}, workers=1)) as computer:
        results = {key: (result.total, result.correct) for key, result in computer.compute(answers) if result}
    assert results == {0: (0.5, False), 1: (1, True)}


def test_a_scorer_that_hangs_is_ended_and_its_answer_is_wrong(scorers: Path) -> None:
    (problem,) = problems([{"question": "?"}], verifier="my_scorers.slow")
    with Grader(workers=1, timeout=0.2) as grader:
        assert dict(grader.grade([(0, problem, "red")])) == {0: 0} and grader.gave_up == 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "broken",
            r"my_scorers.broken raised KeyError: 'colour' \(.*my_scorers.py line 13\) on problem rows-0: correct it",
        ),
        ("text", "my_scorers.text gave 'good', which is no number from 0 to 1 on problem rows-0: correct it"),
        ("huge", "my_scorers.huge gave a number too large for a float, which is not from 0 to 1 on problem rows-0"),
        ("one", "my_scorers.one gave '1', which is no number from 0 to 1 on problem rows-0: correct it"),
        ("leaving", r"my_scorers.leaving raised SystemExit: 1 \(.*line 28\) on problem rows-0: correct it"),
        ("large", "my_scorers.large gave 2, which is not from 0 to 1 on problem rows-0: correct it"),
    ],
)
def test_a_scorer_that_fails_is_told_and_not_counted_as_wrong(scorers: Path, name: str, sentence: str) -> None:
    (problem,) = problems([{"question": "?"}], verifier=f"my_scorers.{name}")
    with Grader(workers=1) as grader, pytest.raises(DirlError, match=sentence):
        dict(grader.grade([(0, problem, "red")]))


def test_rows_run_no_code_that_the_command_line_does_not_name(scorers: Path) -> None:
    rows = [{"question": "?", "words": ["red"], "verifier": "my_scorers.words"}]
    with pytest.raises(DirlError, match=r"rows.jsonl line 1 names the code my_scorers.words: .* bench.scorers=\[my_"):
        problems(rows)
    assert "my_scorers" not in sys.modules
    (problem,) = problems(rows, scorers=["my_scorers.words"])
    assert problem.verifier == "my_scorers.words"


@pytest.mark.parametrize(
    ("row", "settings", "sentence"),
    [
        ({"verifier": "choise"}, {}, "line 1: no verifier is called choise: did you mean choice?"),
        ({}, {"verifier": "choise"}, "bench.verifier=choise: did you mean choice?"),
        ({}, {"verifier": "my_scorers.word"}, "my_scorers has no function word: did you mean words?"),
        ({}, {"verifier": "nowhere.words"}, "the scorer nowhere.words cannot be loaded"),
        ({}, {"verifier": "..x.y"}, "the scorer ..x.y cannot be loaded"),
        ({"options": ["a"]}, {"verifier": "choice"}, "options must be a list of two or more texts"),
        ({"options": {"A": ["a"], "B": "b"}}, {"verifier": "choice"}, "options must be texts by a letter each, not A"),
        ({"options": ["a", "b"], "answer": 5}, {"verifier": "choice"}, "has the answer 5 and 2 options"),
        ({"aliases": "Bob"}, {"verifier": "text"}, "aliases must be a list of texts"),
        ({"details": "x"}, {"verifier": "countdown"}, "details must be an object"),
    ],
)
def test_a_mistake_in_a_row_is_told_by_its_line(
    scorers: Path, row: dict[str, Any], settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DirlError) as error:
        problems([{"question": "?", "answer": "B", **row}], **settings)
    assert sentence in str(error.value)
