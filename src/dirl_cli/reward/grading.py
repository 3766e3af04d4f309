"""Grading: the final answer of a completion by its problem's verifier, in processes that may be killed."""

import logging
import multiprocessing
import queue
import signal
import sys
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from dirl_cli.distributed import cores
from dirl_cli.errors import DirlError
from dirl_cli.reward.verifiers import verifier_of
from dirl_cli.types import Problem

MEMORY = 4 * 2**30  # bytes of address space per worker, of which math-verify needs a tenth
ATTEMPTS = 3  # a worker that dies may have been killed for what others did

Credit = float | None  # from 0 to 1, which is right; None: it took too long or too much memory


class Grader:
    """Grades completions in `workers` processes, by default one per core, giving each at most `timeout` seconds.

    What is graded has credit from 0 to 1, which is right; giving up has none. Submit as completions arrive and collect
    from `finished` on the way and from `rest` at the end, or call `grade`. Processes start when answers wait for them;
    most answers are plain and need none.
    """

    def __init__(self, workers: int | None = None, timeout: float = 5.0) -> None:
        self.workers = workers or cores()
        self.gave_up = 0  # answers that took too long or too much memory
        self._open = 0
        self._results: queue.SimpleQueue[tuple[Hashable, Future[Credit] | float]] = queue.SimpleQueue()
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

    def submit(self, key: Hashable, problem: Problem, completion: str) -> None:
        """Begin to grade a completion; its credit comes back under `key`."""
        self._open += 1
        verifier = verifier_of(problem)
        answer = verifier.extract(completion)
        if answer is None:
            self._results.put((key, 0.0))
            return

        # Most answers are plain numbers, which take no process; None stands for those that need one.
        credit = verifier.quick(problem, answer)
        if credit is None:
            future = self._threads.submit(self._compare, problem, answer)
            future.add_done_callback(lambda done: self._results.put((key, done)))
        else:
            self._results.put((key, credit))

    def finished(self) -> Iterator[tuple[Hashable, float]]:
        """The credits there are, without waiting for more."""
        while not self._results.empty():
            key, credit = self._next()
            yield key, credit or 0.0

    def rest(self) -> Iterator[tuple[Hashable, float]]:
        """Every credit still due, as it comes."""
        while self._open:
            key, credit = self._next()
            yield key, credit or 0.0

    def grade(self, items: Iterable[tuple[Hashable, Problem, str]]) -> Iterator[tuple[Hashable, float]]:
        """The credit under each key of (key, problem, completion), in the order in which they are reached."""
        for key, credit in self.credits(items):
            yield key, credit or 0.0

    def credits(self, items: Iterable[tuple[Hashable, Problem, str]]) -> Iterator[tuple[Hashable, Credit]]:
        """As `grade`, with None for what it gives up on."""
        for key, problem, completion in items:
            self.submit(key, problem, completion)
            while not self._results.empty():
                yield self._next()
        while self._open:
            yield self._next()

    def _compare(self, problem: Problem, answer: str) -> Credit:
        """Compare in the first idle process, in one of the threads that wait for them."""
        worker = self._idle.get()
        try:
            return worker.compare(problem, answer)
        finally:
            self._idle.put(worker)

    def _next(self) -> tuple[Hashable, Credit]:
        """Wait for the next credit."""
        key, result = self._results.get()
        self._open -= 1
        if isinstance(result, float):
            return key, result
        credit = result.result()
        if credit is None:
            self.gave_up += 1
        return key, credit


class Worker:
    """A process that compares one answer after the other; it starts with the first, and anew when it has ended."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._dismissed = False
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection

    def compare(self, problem: Problem, answer: str) -> Credit:
        """The credit of an answer by its problem's verifier.

        Raises what the verifier does of what the user can mend, and EOFError where the process does not start.
        """
        # A process that its own alarm ended took too long; any other may have been killed for what others did.
        for _ in range(ATTEMPTS):
            if self._process is None:
                self._start()
            if self._dismissed:
                break
            with suppress(EOFError, ConnectionError):  # it ended
                self._pipe.send((problem, answer))
                credit: Credit | DirlError = self._pipe.recv()
                if isinstance(credit, DirlError):
                    raise credit
                return credit
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
    """Answer each (problem, answer) with a credit, in a process that ends when one takes longer or its parent has."""
    prepare_grading_worker()
    with suppress(EOFError, ConnectionError):
        pipe.send(None)
        while True:
            problem, answer = pipe.recv()
            pipe.send(credit_within(seconds, problem, answer))


def credit_within(seconds: float, problem: Problem, answer: str) -> Credit | DirlError:
    """The credit of an answer, None where it takes too much memory; or what the user can mend."""
    verifier = verifier_of(problem)
    try:
        verifier.load()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return verifier.credit(problem, answer)
    except (MemoryError, RecursionError):
        return None
    except DirlError as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def prepare_grading_worker() -> None:
    """Bound the worker's memory, and let its time limit hold also inside C code."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
