"""Verify answers that are programs by tests: functions by Python's statements or by results, scripts by their output.

A program is run where it can compute and nothing else, beside a judge that has the tests (program_server.py).
"""

import ast
import builtins
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.reward.confinement import OUTPUT
from dirl_cli.reward.plain_values import send_message
from dirl_cli.reward.program_server import END, ENDED, KILLED, PAIR, PROGRAM, READY, UNABLE
from dirl_cli.types import Problem

FENCE = re.compile(r"^([ \t]*)```[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
END_OF_THOUGHT = "</think>"
ATTEMPTS = 3  # a server that dies may have been killed for what others did
SHARE_OF_TIME = 0.9  # for running; the rest is the grader's, which ends a process whose time is up
SECONDS = 5.0  # where no grader sets a time
SOURCE = Path(__file__).parents[2]
START = """
import sys
sys.path.append(sys.argv[1])
from dirl_cli.reward.program_server import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""
PASSED_ON = ("LD_LIBRARY_PATH",)  # of the environment, which may hold secrets

Test = str | dict[str, Any]
"""Statements of Python, {input, output} of a script, or {function, arguments, result} of a function."""


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


# What an answer goes on from: the head of a function, as in HumanEval.


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


# Running.


class ProgramServer:
    """A process that forks what runs answers: see program_server.py.

    Raises DirlError where the kernel cannot confine a process, and ConnectionError where it or a child was killed.
    """

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(SOURCE), str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", "-c", START, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
                start_new_session=True,
            )
        word = b""
        with suppress(ConnectionError):  # it ended
            word = self._control.recv(64)
        if word != READY:
            self.stop()
        if word == UNABLE:
            raise DirlError(
                "answers that are programs are run only where the kernel can confine them, Linux with seccomp on x86-64"
                " or aarch64: run this there, or in a container that allows it"
            )
        if word != READY:
            raise ConnectionError("the process that runs programs did not start")

    def stop(self) -> None:
        """End it, and with it what it runs."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def count_passed(
        self, program: list[str], setup: str, tests: Sequence[Test], function: str, deadline: float
    ) -> int:
        """How many tests pass that ask a program's functions, one after another, before a deadline.

        setup: statements that are run before them. function: the name that is the program's, whatever else has it.
        """
        with socket_pairs(3) as ((ours, answer_end), (calls, judge_end), (verdicts, tests_end)):
            self._begin(PAIR, deadline, [answer_end, calls, tests_end, judge_end])
            results = b""
            try:
                with suppress(ConnectionError):  # what ends before it reads passes nothing
                    send_message(ours.fileno(), program)
                    send_message(verdicts.fileno(), {"setup": setup, "tests": tests, "function": function})
                while len(results) < len(tests) and is_readable(verdicts, deadline):
                    result = verdicts.recv(len(tests) - len(results))
                    if not result:
                        break
                    results += result
            finally:
                self._end(deadline)
        return results.count(b"1")

    def output_of(self, program: list[str], text: str, deadline: float) -> str | None:
        """What a script writes that is given a text to read; None where it fails or does not end before a deadline."""
        with socket_pairs(1) as ((ours, theirs),), memory_file(text) as reads, memory_file("") as writes:
            self._begin(PROGRAM, deadline, [theirs], [reads, writes])
            try:
                with suppress(ConnectionError):
                    send_message(ours.fileno(), program)
                is_readable(ours, deadline)  # it is, too, when the other end is closed
            finally:
                exit_code = self._end(deadline)
            if exit_code != 0:
                return None
            return os.pread(writes, OUTPUT, 0).decode(errors="replace")

    def _begin(self, kind: bytes, deadline: float, sockets: Sequence[socket.socket], files: Sequence[int] = ()) -> None:
        """Have children forked that own these sockets, which are closed here, so that their end can be seen."""
        seconds = max(deadline - time.monotonic(), 0)
        descriptors = [end.fileno() for end in sockets]
        socket.send_fds(self._control, [b"%s %f" % (kind, seconds)], [*descriptors, *files])
        for end in sockets:
            end.close()

    def _end(self, deadline: float) -> int:
        """Kill the children, which before the deadline are about to end by themselves.

        Returns the exit code of the last, a negative one where it was killed here.
        """
        self._control.send(ENDED if time.monotonic() < deadline else END)
        word = self._control.recv(64)
        if not word or word == KILLED:
            raise ConnectionError("a process that runs programs was killed")
        return int(word)


@lru_cache(maxsize=1)
def program_server() -> ProgramServer:
    """The server of this process, started where there is none."""
    return ProgramServer()


def start_program_server() -> None:
    """Start the server of this process where there is none. Raises DirlError where it does not start."""
    for _ in range(ATTEMPTS):
        with suppress(OSError):
            program_server()
            return
    raise DirlError(
        "the process that runs answers which are programs does not start: free memory, or start fewer such processes"
        " with grade_workers=1 in dirl eval and reward.workers=1 in dirl rl"
    )


def stop_program_server() -> None:
    """End the server of this process where there is one, so that the next answer starts another."""
    if program_server.cache_info().currsize:
        program_server().stop()
    program_server.cache_clear()


@contextmanager
def socket_pairs(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Pairs of connected sockets, all closed afterwards."""
    pairs = [socket.socketpair() for _ in range(count)]
    try:
        yield pairs
    finally:
        for pair in pairs:
            for end in pair:
                end.close()


@contextmanager
def memory_file(text: str) -> Iterator[int]:
    """A file in memory that holds a text, to be read from its beginning."""
    descriptor = os.memfd_create("text")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(text.encode(errors="replace"))
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def is_readable(end: socket.socket, deadline: float) -> bool:
    """Wait until something can be read or the other end is closed. Returns whether that was before a deadline."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(max(deadline - time.monotonic(), 0) * 1000))
