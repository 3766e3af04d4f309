"""The process that answers which are programs are forked from: it has nothing of a run in it, and never sees a test.

It is started anew, not forked, and has the modules of Python's library that programs import; a fork takes a
millisecond. The program runs in one child. Tests that are Python run in another, the judge, which has no line of the
program in it: it asks for every call of a function, and gets plain values. Both can compute and nothing else
(confinement.py). An answer therefore can neither read what it is tested by nor say that it passed.
"""

import atexit
import builtins
import importlib
import os
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dirl_cli.reward.confinement import can_confine, confine, descriptor_status, end_with
from dirl_cli.reward.plain_values import (
    Remote,
    built_in_names,
    decode,
    encode,
    read_message,
    received,
    send_message,
)

# What programs may import: afterwards no file can be opened. Some of it is imported by others late.
LIBRARY = (
    "__future__", "_strptime", "abc", "array", "ast", "base64", "binascii", "bisect", "calendar", "cmath", "codecs",
    "collections", "collections.abc", "contextlib", "copy", "csv", "ctypes", "dataclasses", "datetime", "decimal",
    "difflib", "enum", "fractions", "functools", "gc", "hashlib", "heapq", "html", "inspect", "io", "itertools",
    "json", "keyword", "locale", "logging", "math", "numbers", "operator", "os", "os.path", "pickle", "platform",
    "pprint", "queue", "random", "re", "reprlib", "resource", "secrets", "select", "signal", "socket", "statistics",
    "string", "struct", "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "timeit", "traceback",
    "types", "typing", "unicodedata", "unittest", "urllib.parse", "uuid", "warnings", "weakref", "zlib",
)  # fmt: skip
# Of these names a test means the module, whether it imports it or not: the answer's would be its own judge.
MODULES_OF_TESTS = {
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "json", "math", "operator", "random", "re", "statistics", "string", "sys",
}  # fmt: skip
ENCODINGS = ("ascii", "latin-1", "utf-16", "utf-32", "utf-8-sig", "cp1252", "idna", "unicode_escape")

PAIR, PROGRAM = b"pair", b"program"  # what is asked for
END, ENDED = b"end", b"ended"  # the children are to be killed, now or where they do not end by themselves
READY, UNABLE = b"ready", b"unable"
KILLED = b"killed"  # from outside, which no child can do itself
ANY_LENGTH = 2**62  # of what comes from the grader


def main(descriptor: int, parent: int) -> None:
    """Serve until the other end of a socket closes. parent: the process that ends this one with itself."""
    end_with(parent)
    with socket.socket(fileno=descriptor) as control:
        if not can_confine() or not is_confined(forked(lambda: None, [], 1.0)):
            control.send(UNABLE)
            return
        load_library()
        control.send(READY)
        while request := receive_order(control):
            carry_out(control, *request)


def load_library() -> None:
    for name in LIBRARY:
        importlib.import_module(name)
    for name in ENCODINGS:
        "".encode(name)
    sys.path.clear()
    sys.path_importer_cache.clear()
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # programs call them, which `site` would make
    os.fstat = descriptor_status  # programs ask it how much there is to read
    importlib.import_module("gc").freeze()  # so that children share their pages


def receive_order(control: socket.socket) -> tuple[bytes, float, list[int]] | None:
    """What is asked for, for how many seconds, and the ends of pipes that came with it; None at the end."""
    words, descriptors, _, _ = socket.recv_fds(control, 64, 8)
    if not words:
        return None
    kind, _, seconds = words.partition(b" ")
    return kind, float(seconds), descriptors


def carry_out(control: socket.socket, kind: bytes, seconds: float, descriptors: list[int]) -> None:
    """Fork what is asked for, wait for the word that ends it, and tell how the last child ended."""
    if kind == PAIR:
        program, answer_end, tests, judge_end = descriptors
        children = [
            forked(lambda: run_functions(program, answer_end), [program, answer_end], seconds),
            forked(lambda: judge(tests, judge_end), [tests, judge_end], seconds),
        ]
    else:
        program, standard_input, standard_output = descriptors
        streams = {standard_input: 0, standard_output: 1}
        children = [forked(lambda: run_script(program), [program], seconds, streams)]
    for descriptor in descriptors:
        os.close(descriptor)

    patience = 0.02 if control.recv(64) == ENDED else 0.0
    codes = [exit_code(child, patience) for child in children]
    reply = KILLED if KILLED in codes else str(codes[-1]).encode()
    with suppress(OSError):
        control.send(reply)


def exit_code(child: int, patience: float) -> int | bytes:
    """The exit code of a child, which is killed if it runs, or that it was killed. patience: seconds to end in."""
    until = time.monotonic() + patience
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended and time.monotonic() < until:
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = os.waitstatus_to_exitcode(status)
    return KILLED if code == -signal.SIGKILL else code


def forked(
    work: Callable[[], None], descriptors: list[int], seconds: float, streams: dict[int, int] | None = None
) -> int:
    """The id of a child that is confined and does some work. descriptors: what it keeps.

    seconds: of computing, after which it is killed. streams: what it gets as standard input and output.
    """
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        end_with(parent)
        for descriptor, stream in (streams or {}).items():
            os.dup2(descriptor, stream)
        first = 3
        for kept in sorted(descriptors):
            os.closerange(first, kept)
            first = kept + 1
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))
        confine(seconds)
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def is_confined(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


# The child that runs an answer.


def run_script(program: int) -> None:
    """Run a program that reads standard input and writes standard output. program: from where it is read."""
    texts = read_message(program, ANY_LENGTH)
    try:
        execute(texts, "__main__")
    except SystemExit as exit:
        if exit.code not in (None, 0):
            raise
    atexit._run_exitfuncs()
    sys.stdout.flush()


def run_functions(program: int, judge_end: int) -> None:
    """Run a program, then call its functions as the judge asks. program: from where it is read."""
    texts = read_message(program, ANY_LENGTH)
    os.close(program)
    sys.set_int_max_str_digits(0)
    objects: list[Any] = []

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    namespace = execute(texts, "answer")
    while True:
        action, *operands = read_message(judge_end)
        try:
            value = done(action, operands, namespace, objects)
            reply = {"value": encode(value, keep)}
        except BaseException as error:
            reply = {"errors": built_in_names(error), "text": str(error)}
        send_message(judge_end, reply)


def execute(texts: list[str], name: str) -> dict[str, Any]:
    """The names that the texts of a program make, one after another, as a module of that name."""
    module = sys.modules[name] = types.ModuleType(name)
    for text in texts:
        exec(compile(text, "<answer>", "exec"), vars(module))
    return vars(module)


def done(action: str, operands: list[Any], namespace: dict[str, Any], objects: list[Any]) -> Any:
    """Do what the judge asks, to an object by its handle or with a name."""
    if action == "name":
        return namespace[operands[0]]
    handle, *rest = operands
    target = objects[handle]
    match action:
        case "call":
            arguments, options = rest
            return target(
                *decode(arguments, objects.__getitem__),
                **{name: decode(value, objects.__getitem__) for name, value in options.items()},
            )
        case "get":
            return getattr(target, rest[0])
        case "set":
            return setattr(target, rest[0], decode(rest[1], objects.__getitem__))
        case "list":
            return list(target)
    raise ValueError(f"nothing is done by {action}")


# The child that runs tests.


class Names(dict[str, Any]):
    """The names of tests, and behind them those of the answer, which are asked for as they are used.

    function: what the tests are of, which is the answer's even where Python has something of that name.
    """

    def __init__(self, ask: Callable[[Any], Any], function: str) -> None:
        super().__init__(__name__="tests")
        self.ask = ask
        self.function = function

    def __missing__(self, name: str) -> Any:
        if name == self.function:
            try:
                return self.of_answer(name)
            except KeyError as error:  # by which Python would go on to its own of that name
                raise NameError(f"the answer has no {name}") from error
        if hasattr(builtins, name):
            raise KeyError(name)
        if name in MODULES_OF_TESTS:
            return sys.modules[name]
        return self.of_answer(name)

    def of_answer(self, name: str) -> Any:
        """What the answer calls so. Raises KeyError where it has nothing of that name."""
        return received(self.ask(["name", name]), self.ask)


def judge(tests: int, answer_end: int) -> None:
    """Run tests, and write a 1 for each that passes and a 0 for any other. tests: from where they come."""
    work = read_message(tests, ANY_LENGTH)
    sys.set_int_max_str_digits(0)

    def ask(request: Any) -> Any:
        send_message(answer_end, request)
        return read_message(answer_end)

    names = Names(ask, work["function"])
    exec(compile(work["setup"], "<setup>", "exec"), names)
    for test in work["tests"]:
        os.write(tests, b"1" if passes(test, names) else b"0")


def passes(test: str | dict[str, Any], names: Names) -> bool:
    """Whether statements raise nothing, or whether a call has the result that it should."""
    try:
        if isinstance(test, dict):
            function = called_function(test["function"], names)
            return bool(without_tuples(function(*test["arguments"])) == test["result"])
        exec(compile(test, "<test>", "exec"), names)
    except BaseException:
        return False
    return True


def called_function(name: str, names: Names) -> Any:
    """A function of the answer, or the method of that name of its class Solution."""
    try:
        solution = names["Solution"]
    except KeyError:
        return names[name] if name in names else names.of_answer(name)
    return getattr(solution() if isinstance(solution, Remote) else solution, name)


def without_tuples(value: Any) -> Any:
    """A value with lists for tuples, which JSON has not."""
    if isinstance(value, list | tuple):
        return [without_tuples(item) for item in value]
    return value
