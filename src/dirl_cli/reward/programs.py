"""Verify answers that are programs by tests: functions by Python's statements or by results, scripts by their output.

A program is run where it can compute and nothing else, beside a judge that has the tests (program_runner.py).
"""

import ast
import builtins
import re
import signal
import time
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.reward.program_runner import ATTEMPTS, Test, program_server, stop_program_server
from dirl_cli.types import Problem

FENCE = re.compile(r"^([ \t]*)```[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
END_OF_THOUGHT = "</think>"
SHARE_OF_TIME = 0.9  # for running; the rest is the grader's, which ends a process whose time is up
SECONDS = 5.0  # where no grader sets a time


def program_in(completion: str) -> str | None:
    """The last block between ``` of a completion, closed or not, or all that follows its thought."""
    text = completion.rpartition(END_OF_THOUGHT)[2]
    blocks = FENCE.findall(text)
    program = text
    if blocks:
        indentation, block = blocks[-1]
        program = re.sub(rf"^[ \t]{{0,{len(indentation)}}}", "", block, flags=re.MULTILINE)  # as in an item of a list
    return program if program.strip() else None


def program_credit(problem: Problem, answer: str) -> float:
    """The share of a problem's tests that a program passes, in the time that the grader gives it."""
    tests, setup, beginning, prelude = tests_of(problem)
    program = [prelude, completed(beginning, answer)]
    function = function_begun(beginning)[1] if beginning else tested_function(tests)
    deadline = time.monotonic() + SHARE_OF_TIME * (signal.getitimer(signal.ITIMER_REAL)[0] or SECONDS)
    for attempt in range(ATTEMPTS):
        try:
            return count_passed(program, setup, tests, function, deadline) / len(tests)
        except ConnectionError:  # killed from outside, perhaps for the memory that others take, or this one
            stop_program_server()
            if attempt == ATTEMPTS - 1:
                raise MemoryError from None
    return 0.0


def count_passed(program: list[str], setup: str, tests: Sequence[Test], function: str, deadline: float) -> int:
    """How many tests a program passes before a deadline: a script has a process for each, functions one for all.

    program: texts that are run one after another.
    """
    passed = 0
    of_functions = []
    for test in tests:
        if isinstance(test, dict) and "input" in test:
            output = program_server().output_of(program, test["input"], deadline)
            passed += output is not None and is_same_output(output, test["output"])
        else:
            of_functions.append(test)
    if of_functions:
        passed += program_server().count_passed(program, setup, of_functions, function, deadline)
    return passed


def is_same_output(output: str, expected: str) -> bool:
    """Whether lines are the same but for space around them, or hold the same numbers, as LiveCodeBench has it."""
    lines = output.strip().split("\n")
    expected_lines = expected.strip().split("\n")
    if len(lines) != len(expected_lines):
        return False
    for line, expected_line in zip(lines, expected_lines, strict=True):
        if line.strip() == expected_line.strip():
            continue
        try:
            if [Decimal(word) for word in line.split()] != [Decimal(word) for word in expected_line.split()]:
                return False
        except InvalidOperation:
            return False
    return True


def tests_of(problem: Problem) -> tuple[list[Test], str, str, str]:
    """A problem's tests, what is run before them, what an answer goes on from, and what is run before it.

    Raises DirlError without tests.
    """
    details = problem.details
    tests = details.get("tests")
    texts = [details.get(name, "") for name in ("setup", "beginning", "prelude")]
    if not isinstance(tests, list) or not tests or not all(map(is_test, tests)) or not all(map(is_text, texts)):
        raise DirlError(
            f"problem {problem.id} has no tests: give a list of statements, of {{input, output}} or of"
            " {function, arguments, result}"
        )
    setup, beginning, prelude = texts
    return tests, setup, beginning, prelude


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_test(test: Any) -> bool:
    """Whether a value of JSON is a test of one of the three kinds."""
    if not isinstance(test, dict):
        return is_text(test)
    if test.keys() == {"input", "output"}:
        return all(map(is_text, test.values()))
    return test.keys() == {"function", "arguments", "result"} and isinstance(test["arguments"], list)


def tested_function(tests: Sequence[Test]) -> str:
    """The function that every statement calls first and that alone can be the answer's; "" where there is none.

    It may have the name of one of Python's own, as in MBPP's `assert sum(10, 15) == 6`.
    """
    names = {called_first(test) for test in tests if isinstance(test, str)}
    return names.pop() if len(names) == 1 else ""


def called_first(statement: str) -> str:
    """The function on the left of an assertion that names nothing else but what is Python's own; otherwise ""."""
    try:
        (assertion,) = ast.parse(statement).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    if not isinstance(assertion, ast.Assert):
        return ""
    call = assertion.test.left if isinstance(assertion.test, ast.Compare) else assertion.test
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return ""

    # Of `set(similar(1))` the answer is `similar`, and `set` judges it.
    calls_within = [node for node in ast.walk(call) if isinstance(node, ast.Call)]
    names = {node.id for node in ast.walk(assertion) if isinstance(node, ast.Name)} - {call.func.id}
    if len(calls_within) > 1 or not all(hasattr(builtins, name) for name in names):
        return ""
    return call.func.id


def completed(beginning: str, answer: str) -> str:
    """The program that an answer makes of its beginning: a function instead of it, or the rest of its body.

    A body begins indented and ends before the first line at the margin, as HumanEval's stop words have it.
    """
    if not beginning:
        return answer
    preamble, name = function_begun(beginning)
    is_body = answer.lstrip("\r\n")[:1].isspace()
    definition = rf"^(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*="
    if not is_body and re.search(definition, answer, re.MULTILINE):
        return f"{preamble}\n{answer}"
    lines: list[str] = []
    for line in answer.splitlines(keepends=True):
        if line[:1].strip() and any(map(str.strip, lines)):
            break
        lines.append(line)
    return beginning + "".join(lines)


def function_begun(beginning: str) -> tuple[str, str]:
    """What stands before the function that a beginning ends in, and that function's name.

    Raises DirlError where there is none.
    """
    try:
        function = ast.parse(f"{beginning}\n    pass\n").body[-1]
    except (SyntaxError, ValueError, RecursionError, IndexError):
        function = None
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        raise DirlError(f"a beginning must end in the head of a function, not in {beginning[-60:]!r}: correct it")
    lines = beginning.splitlines(keepends=True)
    return "".join(lines[: function.lineno - 1]), function.name
