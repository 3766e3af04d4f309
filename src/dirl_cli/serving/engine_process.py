"""An engine in a process of its own, which so has an interpreter of its own: HTTP takes no time from it.

This is the server's end of a pipe, engine_host.py the engine's. The server sends orders, and the engine what has become
of answers, of calls and of itself: each a name and what belongs to it, pickled. Either reads the pipe's end where the
other is no more.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import count
from threading import Lock, Thread
from typing import Any, Self

from dirl_cli.errors import DirlError, death
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.sampler import GivenUp
from dirl_cli.serving.engine import FAILED, STOPPING, EngineState, Query, ReadWeights
from dirl_cli.serving.engine_host import News, run_engine
from dirl_cli.serving.engine_thread import EngineThread
from dirl_cli.serving.open_queries import OpenQueries

JOIN = 10  # seconds for the engine's last step
LAST_WORDS = 10  # seconds that a process whose pipe has ended may take to end


class EngineProcess:
    """See `Engine`: the server's end. begin: gives the engine, in its process; it is pickled."""

    def __init__(self, begin: Callable[[], EngineThread]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=run_engine, args=(theirs, begin), name="engine")
        self.theirs = theirs
        self.ended: Future[None] = Future()
        self.end = STOPPING
        self.state = EngineState(WeightsId(0))
        self.open = OpenQueries()
        self.numbers = count()
        self.calls: dict[int, Future[Any]] = {}
        self.sending = Lock()

    def start(self) -> tuple[int, int]:
        """Start the process and wait for its first batch: its slots and its length.

        Raises what keeps it from opening one.
        """
        earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)  # so it begins; Ctrl-C reaches both processes
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, earlier)
        self.theirs.close()  # so that its end is the pipe's
        try:
            name, *content = self.connection.recv()
        except EOFError:
            raise self._death() from None
        except BaseException:  # a signal while it loads the model
            self.process.kill()
            raise
        if name == "ended":
            raise content[0]
        [opened, self.state] = content
        Thread(target=self._receive, name="engine", daemon=True).start()
        return opened

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it, and end it where it does not within JOIN seconds."""
        self.stop()
        self.process.join(JOIN)
        self.process.kill()  # it has nothing to save

    def submit(self, query: Query) -> None:
        query.number = next(self.numbers)
        self.open.add(query.number, query)
        self._send(
            "submit", query.number, query.prompt_ids, query.samples, query.decoding, query.weights, query.answer_ids
        )
        if self.ended.done():
            self._give_back()

    def withdraw(self, query: Query, samples: Iterable[int]) -> None:
        samples = list(samples)
        self.open.close(query.number, samples)
        self._send("withdraw", query.number, samples)

    def refuse_waiting(self) -> None:
        self._send("refuse_waiting")

    def drop_running(self) -> None:
        self._send("drop_running")

    def sleep(self) -> Future[None]:
        return self._call("sleep")

    def wake(self) -> Future[None]:
        return self._call("wake")

    def update_weights(self, read: ReadWeights, version: int | None, sha256: str | None = None) -> Future[int]:
        return self._call("update_weights", read, version, sha256)

    def stop(self) -> None:
        self._send("stop")

    def _call(self, name: str, *arguments: Any) -> Future[Any]:
        number = next(self.numbers)
        future: Future[Any] = Future()
        self.calls[number] = future
        self._send("call", number, name, arguments)
        future.add_done_callback(partial(self._tell_cancelled, number))
        if self.ended.done():
            self._give_back()
        return future

    def _tell_cancelled(self, number: int, future: Future[Any]) -> None:
        if future.cancelled():
            self.calls.pop(number, None)
            self._send("cancel", number)

    def _send(self, *message: Any) -> None:
        with self.sending, suppress(OSError):  # of a process that is over, which the end of the pipe tells
            self.connection.send(message)

    # In the thread that receives

    def _receive(self) -> None:
        error: DirlError | None = None
        try:
            while True:
                name, *content = self.connection.recv()
                if name == "news":
                    self._deliver(*content)
                elif name == "done":
                    self._finish(*content)
                else:
                    [error] = content
                    break
        except (EOFError, OSError):
            error = self._death()
        self.end = str(error) if error else STOPPING
        if error:
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)
        self._give_back()  # after `ended`, so that whoever comes later sees that it is over

    def _deliver(self, news: News, state: EngineState) -> None:
        self.state = state
        for number, one in news:
            query = self.open.get(number)
            if isinstance(one, GivenUp) or one.stop_reason:
                self.open.close(number, [one.sample])
            if query:
                query.deliver(one)

    def _finish(self, number: int, value: Any, error: DirlError | None, state: EngineState) -> None:
        self.state = state
        future = self.calls.pop(number, None)
        if future is None or not future.set_running_or_notify_cancel():
            return  # whoever called is gone
        if error:
            future.set_exception(error)
        else:
            future.set_result(value)

    def _give_back(self) -> None:
        """Tell everybody who still waits, or has just come, that nothing comes."""
        for number, query, samples in self.open.take_all():
            for sample in sorted(samples):
                query.deliver(GivenUp(number, sample, self.end))
        while self.calls:
            _, future = self.calls.popitem()
            if future.set_running_or_notify_cancel():
                future.set_exception(DirlError(self.end))

    def _death(self) -> DirlError:
        """What to say of a process that has ended without a word."""
        self.process.join(LAST_WORDS)
        code = self.process.exitcode
        if code is not None and code < 0:
            return DirlError(f"the engine {death(code, 'give a smaller rollout.max_batch or serve.max_length')}")
        return DirlError(FAILED)
