"""A user's own rewards in processes that may be killed: they may hang, crash or leave memory in any state."""

import multiprocessing
import queue
import signal
import traceback
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError
from contextlib import suppress
from functools import partial
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from dirl_cli.reward.rewards import Answer, find_reward

Outcome = float | list[float] | str
"""A reward's value, those of a process reward, or in a few words why there is none."""


class RewardPool:
    """Calls rewards by name in `workers` processes, each call for at most `timeout` seconds.

    The processes start with the first call, and import what they need before its time begins to run.
    """

    def __init__(self, names: Sequence[str], workers: int, timeout: float) -> None:
        self.timeout = timeout
        self._open = 0
        self._results: queue.SimpleQueue[tuple[Hashable, Outcome]] = queue.SimpleQueue()
        context = multiprocessing.get_context("forkserver")  # as in grading.py, but without its bound on memory
        self._pool = ProcessPool(workers, context=context, initializer=prepare_reward_worker, initargs=[names])

    def close(self) -> None:
        self._pool.stop()
        self._pool.join()

    def submit(self, key: Hashable, name: str, answer: Answer, options: Mapping[str, Any]) -> None:
        """Begin to compute a reward; its outcome comes back under `key`."""
        self._open += 1
        call = [name, answer, options, self.timeout]
        try:
            future = self._pool.schedule(attempt_within, args=call, timeout=self.timeout)
        except RuntimeError as error:  # pebble's own processes may break where one of them is killed
            self._results.put((key, f"the processes of rewards broke: {error}"))
        else:
            future.add_done_callback(partial(self._collect, key))

    def finished(self) -> Iterator[tuple[Hashable, Outcome]]:
        """The outcomes there are, without waiting for more."""
        while not self._results.empty():
            yield self._next()

    def rest(self) -> Iterator[tuple[Hashable, Outcome]]:
        """Every outcome still due, as it comes."""
        while self._open:
            yield self._next()

    def _collect(self, key: Hashable, future: ProcessFuture) -> None:
        if future.cancelled():
            return
        match future.exception():
            case None:
                self._results.put((key, future.result()))
            case TimeoutError():
                self._results.put((key, f"it took longer than {self.timeout:g} s"))
            case ProcessExpired(exitcode=code):
                self._results.put((key, f"its process ended with code {code}"))
            case error:
                self._results.put((key, f"{type(error).__name__}: {error}"))

    def _next(self) -> tuple[Hashable, Outcome]:
        outcome = self._results.get()
        self._open -= 1
        return outcome


def prepare_reward_worker(names: Sequence[str]) -> None:
    """Import the rewards and let time limits be ours alone, which also hold inside C code."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for name in names:
        with suppress(Exception):  # what fails here fails again in `attempt`, which can tell
            find_reward(name)


def attempt_within(name: str, answer: Answer, options: Mapping[str, Any], seconds: float) -> Outcome:
    """`attempt`, in a process that ends itself should it outlive both its time and its parent."""
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    try:
        return attempt(name, answer, options)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def attempt(name: str, answer: Answer, options: Mapping[str, Any]) -> Outcome:
    """The reward's value, or what it raised and where."""
    try:
        value: Any = find_reward(name)(answer, **options)
        if isinstance(value, list | tuple):
            return [float(one) for one in value]
        return float(value)
    except Exception as error:  # a reward may raise anything, and not every exception travels between processes
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({frame.filename} line {frame.lineno})"
