"""Read a row as a problem that a program solves: its tests, under our names, in the layouts of the known benchmarks."""

import base64
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError
from dirl_cli.reward.programs import function_begun, is_test

CODE = ("tests", "setup", "beginning", "prelude")  # our columns
# What LiveCodeBench runs before every answer, whose types and functions are often used without an import.
MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json",
)  # fmt: skip
PRELUDE = "\n".join(
    [
        *(f"from {module} import *" for module in (*MODULES, "builtins", "typing")),
        *(f"import {module}" for module in MODULES),
        "sys.setrecursionlimit(50000)",
    ]
)
LARGEST = 2**30  # bytes of compressed tests, expanded


def recognise_code(row: Row) -> Row:
    """The row under our names where it has tests, in our columns or those of a benchmark; any other as it is.

    tests: statements of Python, or objects of `input` and `output`, or of `function`, `arguments` and `result`.
    setup: Python that is run before them. beginning: the head of a function, which an answer may go on from.
    prelude: Python that is run before an answer.
    Raises DirlError for tests that are none.
    """
    fields = row.fields
    if fields.get("verifier") not in (None, "code"):
        return row
    if "tests" in fields:
        return row._replace(fields=own_fields(row))
    layouts = (
        ({"prompt", "test", "entry_point"}, human_eval_fields, "a function to complete, as in HumanEval's rows"),
        ({"test_list"}, mbpp_fields, "`test_list` are the tests and part of the question, as in MBPP's rows"),
        ({"question_content", "public_test_cases"}, livecodebench_fields, "LiveCodeBench's tests, public and private"),
    )
    for names, read, note in layouts:
        if names <= fields.keys():
            try:
                recognised = read(fields)
            except (TypeError, ValueError, KeyError, AttributeError, RecursionError, zlib.error) as error:
                raise DirlError(f"{row.location} has tests that cannot be read ({error}): correct it") from error
            return row._replace(fields=recognised, notes=(*row.notes, note))
    return row


def has_tests(fields: Mapping[str, Any]) -> bool:
    """Whether recognised fields have tests to be graded by, rather than columns for another verifier."""
    return "tests" in fields and fields.get("verifier") in (None, "code")


def own_fields(row: Row) -> dict[str, Any]:
    """The fields with the tests as a list, which a table may hold as JSON."""
    fields = dict(row.fields)
    tests = fields["tests"]
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError):
            tests = None
    if isinstance(tests, list):  # Parquet fills up objects of several kinds
        tests = [without_nothing(test) if isinstance(test, Mapping) else test for test in tests]
    if not isinstance(tests, list) or not tests or not all(map(is_test, tests)):
        raise DirlError(
            f"{row.location}: tests must be a list of statements, of {{input, output}} or of"
            " {function, arguments, result}: correct it"
        )
    for name in ("setup", "beginning", "prelude"):
        if not isinstance(fields.get(name, ""), str):
            raise DirlError(f"{row.location}: {name} must be text: correct it")
    if fields.get("beginning"):
        function_begun(fields["beginning"])
    return {**fields, "tests": tests}


def without_nothing(test: Mapping[str, Any]) -> dict[str, Any]:
    """A test without the columns of another kind; the result of a function may be nothing."""
    kept = {name: value for name, value in test.items() if value is not None}
    if "function" in kept:
        kept["result"] = test.get("result")
    return kept


def human_eval_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row of HumanEval (arXiv 2107.03374); `check` is one test."""
    prompt, entry_point = fields["prompt"], fields["entry_point"]
    preamble, name = function_begun(prompt)
    if name != entry_point:
        raise ValueError(f"the prompt ends in {name}, not in {entry_point}")
    own: dict[str, Any] = {
        "question": prompt,
        "tests": [f"{fields['test']}\ncheck({entry_point})"],
        "setup": preamble,  # the tests may use what helps in the prompt
        "beginning": prompt,
    }
    if solution := fields.get("canonical_solution"):
        own["solution"] = prompt + solution
    return with_labels(own, fields, "task_id")


def mbpp_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row of MBPP (arXiv 2108.07732), full or sanitized: put as there, with the tests."""
    task = fields.get("text") or fields["prompt"]
    tests = list(fields["test_list"])
    if not tests or not all(isinstance(test, str) for test in (task, *tests)):
        raise ValueError("test_list must hold statements")
    setup = [*(fields.get("test_imports") or []), fields.get("test_setup_code") or ""]
    own: dict[str, Any] = {
        "question": "\n".join([f"{task} Your code should pass these tests:", "", *tests]),
        "tests": tests,
        "setup": "\n".join(setup).strip(),
    }
    if solution := fields.get("code"):
        own["solution"] = solution
    return with_labels(own, fields, "task_id")


def livecodebench_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row of LiveCodeBench (arXiv 2403.07974)."""
    function = json.loads(fields.get("metadata") or "{}").get("func_name", "")
    cases = json.loads(fields["public_test_cases"]) + private_cases(fields.get("private_test_cases") or "[]")
    question = fields["question_content"]
    if starter := fields.get("starter_code"):
        question += f"\n\nBegin with\n\n```python\n{starter.rstrip()}\n```"
    own = {"question": question, "tests": [test_of(case, function) for case in cases], "prelude": PRELUDE}
    return with_labels(own, fields, "question_id", "difficulty")


def test_of(case: Mapping[str, Any], function: str) -> dict[str, Any]:
    """A case of LiveCodeBench as a test: of a script, or of a function with an argument of JSON on each line."""
    if case.get("testtype") != "functional":
        return {"input": case["input"], "output": case["output"]}
    arguments = [json.loads(line) for line in case["input"].split("\n") if line.strip()]
    return {"function": function, "arguments": arguments, "result": json.loads(case["output"])}


def private_cases(text: str) -> list[dict[str, Any]]:
    """The private cases: JSON, or JSON that was pickled as a text, compressed and spelled in base 64.

    The pickle is not loaded: it is read for the one text that it holds.
    """
    if text.lstrip().startswith("["):
        cases: list[dict[str, Any]] = json.loads(text)
        return cases
    expander = zlib.decompressobj()
    data = expander.decompress(base64.b64decode(text), LARGEST)
    if not expander.eof:
        raise ValueError("the private tests do not end")
    texts = [argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
    if len(texts) != 1:
        raise ValueError("the private tests are no single text")
    return json.loads(texts[0])


def with_labels(
    own: dict[str, Any], fields: Mapping[str, Any], id_column: str, subset_column: str = ""
) -> dict[str, Any]:
    """The fields with an id and a subset where there are any, and the system turn."""
    for name, column in (("id", id_column), ("subset", subset_column), ("system", "system")):
        if (value := fields.get(column)) is not None:
            own[name] = value if name == "system" else str(value)
    return own
