r"""Grading: the last `\boxed{}` of a completion against the reference answer, in processes that may be killed."""

import logging
import multiprocessing
import queue
import signal
import sys
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import TimeoutError
from functools import partial
from types import TracebackType
from typing import Self

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from dirl_cli.reward.boxed import last_boxed
from dirl_cli.reward.equality import plainly_equal, verified

LONGEST_ANSWER = 2000  # characters; no reference answer comes near, and parsing time grows faster than length
MEMORY = 4 * 2**30  # bytes of address space per worker, of which math-verify needs a tenth
GAVE_UP = (TimeoutError, ProcessExpired, MemoryError, RecursionError)


class Grader:
    """Grades completions in `workers` processes, giving each at most `timeout` seconds; giving up counts as wrong.

    Submit as completions arrive and collect from `finished` on the way and from `rest` at the end, or call `grade`.
    The processes start with the first answer that needs one.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0) -> None:
        self.timeout = timeout
        self.gave_up = 0  # answers that took too long or too much memory
        self._open = 0
        self._results: queue.SimpleQueue[tuple[Hashable, bool | BaseException]] = queue.SimpleQueue()
        # A fork of this process would inherit its threads and its GPU; this server holds math-verify and nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["math_verify", "dirl_cli.reward.grading"])
        self._pool = ProcessPool(workers, context=context, initializer=prepare_worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.stop()
        self._pool.join()

    def submit(self, key: Hashable, gold: str, completion: str) -> None:
        """Begin to grade a completion; its verdict comes back under `key`."""
        self._open += 1
        answer = last_boxed(completion)
        gold = gold.strip()
        plain = False if answer is None else plainly_equal(gold, answer)
        if plain is None and answer is not None and len(answer) <= LONGEST_ANSWER:
            future = self._pool.schedule(verify_within, args=[gold, answer, self.timeout], timeout=self.timeout)
            future.add_done_callback(partial(self._collect, key))
        else:
            self._results.put((key, bool(plain)))

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

    def _collect(self, key: Hashable, future: ProcessFuture) -> None:
        if not future.cancelled():
            self._results.put((key, future.exception() or future.result()))

    def _next(self) -> tuple[Hashable, bool]:
        key, verdict = self._results.get()
        self._open -= 1
        if isinstance(verdict, GAVE_UP):
            self.gave_up += 1
            return key, False
        if isinstance(verdict, BaseException):
            raise verdict
        return key, verdict


def prepare_worker() -> None:
    """Bound the worker's memory and let time limits be ours alone, which also hold inside C code."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def verify_within(gold: str, answer: str, seconds: float) -> bool:
    """`verified`, in a process that ends itself should it outlive both its time and its parent."""
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    try:
        return verified(gold, answer)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
