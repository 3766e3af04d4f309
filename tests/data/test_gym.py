"""Tasks of reasoning-gym as data: disjoint splits, made anew from their seeds, scored by their own rules."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dirl_cli.data.gym import Gym
from dirl_cli.errors import DirlError
from dirl_cli.reward.grading import Grader
from dirl_cli.reward.gym import EVALUATED, HARMLESS, UNREPEATABLE, gym_answer_in, gym_credit
from dirl_cli.types import Problem

reasoning_gym = pytest.importorskip("reasoning_gym.factory", reason="reasoning-gym is not installed")
TASKS = sorted(
    set(reasoning_gym.DATASETS) - UNREPEATABLE - {"composite"}
)  # which is a mixture of the others, and has none by default

ARITHMETIC = Gym("sums", "basic_arithmetic", {"min_terms": 2, "max_terms": 2}, train=30, held_out=10, test=10)


def questions(task: str, options: dict | None = None, count: int = 1) -> list[Problem]:
    return Gym("questions", task, options or {}, train=0, held_out=0, test=count).problems()


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_its_own_answer_full_credit_when_it_is_read_back_from_a_file(task: str) -> None:
    [problem] = questions(task, count=1)
    stored = json.loads(json.dumps(problem.details))
    again = Problem(problem.id, problem.question, problem.answer, verifier=problem.verifier, details=stored)
    if problem.answer:  # some tasks have a scorer alone
        assert gym_credit(again, problem.answer) == pytest.approx(1, abs=0.02)
    if task != "game_of_life_halting":  # whose scorer takes any text for True
        assert 0 <= gym_credit(again, "?!") < 0.5


def test_no_question_is_in_two_splits_and_the_seed_decides_them() -> None:
    sets = [
        {p.question for p in replace(ARITHMETIC, split=split).problems()} for split in ("train", "validation", "test")
    ]
    assert [len(questions) for questions in sets] == [30, 10, 10]
    assert len(set.union(*sets)) == 50
    assert replace(ARITHMETIC).problems() == replace(ARITHMETIC, train=0, held_out=0).problems()
    assert {p.question for p in replace(ARITHMETIC, seed=1).problems()} != sets[2]


def test_demonstrations_are_questions_with_the_tasks_answers() -> None:
    problems = ARITHMETIC.training_problems()
    for problem, row in zip(problems, ARITHMETIC.demonstrations(), strict=True):
        user, assistant = row.fields["messages"]
        assert (user["content"], assistant["content"]) == (problem.question, problem.answer)


def test_options_make_a_task_harder() -> None:
    easy = questions("basic_arithmetic", {"min_terms": 2, "max_terms": 2}, count=5)
    hard = questions("basic_arithmetic", {"min_terms": 6, "max_terms": 6}, count=5)
    assert all(operators(problem.question) == 1 for problem in easy)
    assert all(operators(problem.question) == 5 for problem in hard)


def operators(question: str) -> int:
    return sum(f" {sign} " in f" {word} " for word in question.split() for sign in "+-*/")


def test_part_of_a_solution_has_part_of_the_credit_which_a_grader_gives_in_a_process_of_its_own() -> None:
    [problem] = questions("mini_sudoku", count=1)
    wrong = problem.answer[:-1] + "1234"["1234".index(problem.answer[-1]) - 1]
    completions = {"right": problem.answer, "nearly": f"<answer>{wrong}</answer>", "nothing": "<think>1</think>"}
    with Grader(workers=1) as grader:
        credits = dict(grader.grade((name, problem, text) for name, text in completions.items()))
    assert credits["right"] == 1 and 0 < credits["nearly"] < 1 and credits["nothing"] == 0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>3?</think> <answer> 4 </answer>", "4"),
        ("<answer>3</answer> no: <answer>4</answer>", "4"),
        (r"so it is \boxed{4}.", "4"),
        ("<think>3?</think>\n4\n", "4"),
        ("4 2\n2 4", "4 2\n2 4"),
        ("<think>only a thought</think>", None),
        ("  ", None),
    ],
)
def test_the_answer_stands_between_tags_in_a_box_or_after_the_thought(completion: str, answer: str | None) -> None:
    assert gym_answer_in(completion) == answer


@pytest.mark.parametrize("task", sorted(EVALUATED - UNREPEATABLE))
@pytest.mark.parametrize(
    "hostile",
    [
        "open({file!r}, 'w')",
        "__import__('pathlib').Path({file!r}).touch()",
        "sin(\"open({file!r}, 'w')\")",
        "(lambda: open({file!r}, 'w'))()",
        "[open({file!r}, 'w') for x in [1]]",
        "3! + open({file!r}, 'w')",
        "getattr(3, 'real')",
    ],
)
def test_an_answer_is_no_program(task: str, hostile: str, tmp_path: Path) -> None:
    [problem] = questions(task)
    assert gym_credit(problem, hostile.format(file=str(tmp_path / "written"))) == 0
    assert not list(tmp_path.iterdir())


def test_what_those_tasks_ask_for_passes() -> None:
    for answer in (
        "(3 + 4)*2/5",
        "[['Q', '_'], ['_', 'Q']]",
        "-x**2*exp(3*x)/2 + C",
        "log(x) - sqrt(2)*sin(x)",
        "1 2\n0 1",
    ):
        assert HARMLESS.fullmatch(answer)


def test_every_task_whose_scorer_evaluates_is_known() -> None:
    package = Path(sys.modules["reasoning_gym"].__file__).parent
    calls = re.compile(r"(?:\beval|parse_expr)\((?:self\.)?(?:answer|user_answer|response)\b")
    found = {file.stem for file in package.rglob("*.py") if calls.search(file.read_text())}
    assert found == EVALUATED


@pytest.mark.parametrize(
    ("task", "options", "sentence"),
    [
        ("knight_swap", {}, "knight_swap makes other questions of a seed in every process: choose another task"),
        ("countdwn", {}, "reasoning-gym has no task countdwn: did you mean countdown?"),
        ("basic_arithmetic", {"min_term": 2}, "basic_arithmetic has no option min_term; did you mean min_terms?"),
        ("basic_arithmetic", {"min_terms": 9}, "basic_arithmetic with {'min_terms': 9}: "),
        ("basic_arithmetic", {"min_terms": "two"}, "basic_arithmetic with {'min_terms': 'two'}: "),
    ],
)
def test_a_task_that_there_is_not_is_refused_with_what_there_is(task: str, options: dict, sentence: str) -> None:
    with pytest.raises(DirlError) as refused:
        Gym("g", task, options)
    assert str(refused.value).startswith(sentence)


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(DirlError, match=r"not installed: pip install reasoning-gym==[0-9.]+$"):
        Gym("g", "countdown")


def test_a_task_without_answers_has_problems_and_no_demonstrations() -> None:
    task = Gym("g", "graph_color", train=2, held_out=0, test=2)
    assert [problem.answer for problem in task.problems()] == ["", ""]
    with pytest.raises(DirlError, match="graph_color has questions without an answer to learn from: use it"):
        task.demonstrations()


def test_a_problem_of_another_version_or_of_no_task_is_refused() -> None:
    [problem] = questions("basic_arithmetic", count=1)
    with pytest.raises(DirlError, match="was made by another version of reasoning-gym"):
        gym_credit(replace(problem, question="What is 1 + 1?"), "2")
    with pytest.raises(DirlError, match="is of no task of reasoning-gym: give details of its task, options, seed"):
        gym_credit(replace(problem, details={}), "2")


def test_what_the_user_can_mend_is_told_where_answers_are_graded_in_other_processes() -> None:
    [problem] = questions("basic_arithmetic")
    with Grader(workers=1) as grader, pytest.raises(DirlError, match="was made by another version of reasoning-gym"):
        list(grader.grade([("key", replace(problem, question="What is 1 + 1?"), "2")]))


EVERY_TASK = """
import json, sys
from reasoning_gym.factory import create_dataset
made = {}
for task in sys.argv[1].split(","):
    entries = [create_dataset(task, seed=seed, size=1)[0] for seed in range(25)]
    made[task] = [(entry["question"], entry["answer"]) for entry in entries]
print()  # after the dots that one of them prints
print(json.dumps(made))
"""


@pytest.mark.slow
def test_every_task_makes_the_same_of_a_seed_in_every_process() -> None:
    made = []
    for order in ("1", "2"):  # of sets
        words = [sys.executable, "-c", EVERY_TASK, ",".join(TASKS)]
        environment = {**os.environ, "PYTHONHASHSEED": order}
        made.append(json.loads(subprocess.check_output(words, env=environment, text=True).splitlines()[-1]))
    assert [task for task in TASKS if made[0][task] != made[1][task]] == []
