"""Grading: what is boxed at the end of a completion against the reference answer, in processes that may be killed."""

import logging
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from dirl_cli.reward.boxed import final_answer, reference
from dirl_cli.reward.equality import plainly_equal, verified

LONGEST_ANSWER = 2000  # characters; no reference answer comes near, and parsing time grows faster than length
MEMORY = 4 * 2**30  # bytes of address space per worker, of which math-verify needs a tenth
ATTEMPTS = 3  # a worker that dies may have been killed for what others did

Verdict = bool | None  # None: it took too long or too much memory


class Grader:
    """Grades completions in `workers` processes, by default one per core, giving each at most `timeout` seconds.

    Giving up counts as wrong. Submit as completions arrive and collect from `finished` on the way and from `rest` at
    the end, or call `grade`. Processes start when answers wait for them; most answers are plain and need none.
    """

    def __init__(self, workers: int | None = None, timeout: float = 5.0) -> None:
        self.workers = workers or cores()
        self.gave_up = 0  # answers that took too long or too much memory
        self._open = 0
        self._results: queue.SimpleQueue[tuple[Hashable, Future[Verdict] | bool]] = queue.SimpleQueue()
        self._processes = [Worker(timeout) for _ in range(self.workers)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()  # the last first: the others need not start
        for worker in self._processes:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(self.workers)  # each waits for a process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._processes:
            worker.dismiss()
        self._threads.shutdown()
        for worker in self._processes:
            worker.end()

    def submit(self, key: Hashable, gold: str, completion: str) -> None:
        """Begin to grade a completion; its verdict comes back under `key`."""
        self._open += 1
        answer = final_answer(completion)
        gold = reference(gold)
        if answer is None:
            self._results.put((key, False))
            return

        # Most answers are plain numbers, which take no process; None stands for those that need math-verify.
        verdict = plainly_equal(gold, answer)
        if verdict is None and len(answer) <= LONGEST_ANSWER:
            future = self._threads.submit(self._compare, gold, answer)
            future.add_done_callback(lambda done: self._results.put((key, done)))
        else:
            self._results.put((key, bool(verdict)))

    def finished(self) -> Iterator[tuple[Hashable, bool]]:
        """The verdicts there are, without waiting for more."""
        while not self._results.empty():
            yield self._next()

    def rest(self) -> Iterator[tuple[Hashable, bool]]:
        """Every verdict still due, as it comes."""
        while self._open:
            yield self._next()

    def grade(self, items: Iterable[tuple[Hashable, str, str]]) -> Iterator[tuple[Hashable, bool]]:
        """The verdict under each key of (key, gold, completion), in the order in which they are reached."""
        for key, gold, completion in items:
            self.submit(key, gold, completion)
            yield from self.finished()
        yield from self.rest()

    def _compare(self, gold: str, answer: str) -> Verdict:
        """Compare in the first idle process, in one of the threads that wait for them."""
        worker = self._idle.get()
        try:
            return worker.compare(gold, answer)
        finally:
            self._idle.put(worker)

    def _next(self) -> tuple[Hashable, bool]:
        """Wait for the next verdict."""
        key, verdict = self._results.get()
        self._open -= 1
        if isinstance(verdict, bool):
            return key, verdict
        compared = verdict.result()
        if compared is None:
            self.gave_up += 1
        return key, bool(compared)


class Worker:
    """A process that compares one answer after the other; it starts with the first, and anew when it has ended."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._dismissed = False
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection

    def compare(self, gold: str, answer: str) -> Verdict:
        """Whether the answer says what the gold says. Raises EOFError where the process does not start."""
        for _ in range(ATTEMPTS):
            if self._process is None:
                self._start()
            if self._dismissed:
                break
            with suppress(EOFError, ConnectionError):  # it ended
                self._pipe.send((gold, answer))
                verdict: Verdict = self._pipe.recv()
                return verdict
            if self.end() == -signal.SIGALRM:
                break
        return None

    def dismiss(self) -> None:
        """Let it compare no more; from any thread."""
        self._dismissed = True
        if self._process is not None:
            self._process.kill()

    def end(self) -> int | None:
        """The exit code of the process, which is killed if it is alive."""
        if self._process is None:
            return None
        self._process.kill()
        self._process.join()
        self._pipe.close()
        exit_code = self._process.exitcode
        self._process = None
        return exit_code

    def _start(self, attempts: int = ATTEMPTS) -> None:
        # A fork of this process would inherit its threads and its GPU; this server holds math-verify and nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["math_verify", "dirl_cli.reward.grading"])
        self._pipe, other_end = context.Pipe()
        process = context.Process(target=serve, args=(other_end, self.timeout), daemon=True)
        try:
            with other_end:  # so that the pipe ends when the process does
                process.start()
            self._pipe.recv()  # it is ready: its imports take no answer's time
        except (EOFError, OSError):
            self._pipe.close()
            if attempts == 1:
                raise
            self._start(attempts - 1)
        else:
            self._process = process


def serve(pipe: Connection, seconds: float) -> None:
    """Answer each (gold, answer) with a verdict, in a process that ends when one takes longer or the parent is gone."""
    prepare_grading_worker()
    with suppress(EOFError, ConnectionError):
        pipe.send(None)
        while True:
            gold, answer = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                verdict: Verdict = verified(gold, answer)
            except (MemoryError, RecursionError):
                verdict = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(verdict)


def prepare_grading_worker() -> None:
    """Bound the worker's memory, and let its time limit hold also inside C code."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
