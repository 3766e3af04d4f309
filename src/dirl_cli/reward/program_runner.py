"""Have programs run: start the process that forks what runs them, hand it a program and its tests, take the results.

What happens in that process is told in program_server.py.
"""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.reward.confinement import OUTPUT
from dirl_cli.reward.plain_values import send_message
from dirl_cli.reward.program_server import END, ENDED, KILLED, PAIR, PROGRAM, READY, UNABLE

ATTEMPTS = 3  # a server that dies may have been killed for what others did
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
