"""An engine in a process of its own, which so has an interpreter of its own: HTTP takes no time from it.

The server's process sends orders over a pipe, and the engine's process what has become of answers, of calls and of
itself: each a name and what belongs to it, pickled. Either process reads the pipe's end where the other is no more.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from threading import Lock, Thread
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.sampler import GivenUp, NewBlock
from dirl_cli.serving.engine import FAILED, STOPPING, Query, ReadWeights
from dirl_cli.serving.engine_thread import EngineThread
from dirl_cli.types import Decoding

REPORT = 0.1  # seconds after which the engine tells of itself where it has nothing else to tell
LAST_WORDS = 10  # seconds that a process whose pipe has ended may take to end

News = list[tuple[int, NewBlock | GivenUp]]
"""What has become of answers, with the number of the query."""


@dataclass(frozen=True)
class EngineState:
    """What an engine tells of itself; see `Engine`."""

    weights: WeightsId
    is_asleep: bool = False
    forwards: int = 0
    num_running: int = 0
    num_waiting: int = 0

    @staticmethod
    def of(engine: EngineThread) -> "EngineState":
        return EngineState(engine.weights, engine.is_asleep, engine.forwards, engine.num_running, engine.num_waiting)


class OpenQueries:
    """Queries by number, each as long as one of its answers is open."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.queries: dict[int, tuple[Query, set[int]]] = {}  # with the samples that are open

    def add(self, number: int, query: Query) -> None:
        with self.lock:
            self.queries[number] = (query, set(query.samples))

    def get(self, number: int) -> Query | None:
        with self.lock:
            query, _ = self.queries.get(number, (None, None))
            return query

    def close(self, number: int, samples: Iterable[int]) -> None:
        with self.lock:
            if number in self.queries:
                _, is_open = self.queries[number]
                is_open.difference_update(samples)
                if not is_open:
                    del self.queries[number]

    def take_all(self) -> list[tuple[int, Query, set[int]]]:
        with self.lock:
            taken = [(number, query, samples) for number, (query, samples) in self.queries.items()]
            self.queries.clear()
        return taken


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

    @property
    def weights(self) -> WeightsId:
        return self.state.weights

    @property
    def is_asleep(self) -> bool:
        return self.state.is_asleep

    @property
    def forwards(self) -> int:
        return self.state.forwards

    @property
    def num_running(self) -> int:
        return self.state.num_running

    @property
    def num_waiting(self) -> int:
        return self.state.num_waiting

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

    def join(self, seconds: float) -> None:
        self.process.join(seconds)
        self.process.kill()  # it has nothing to save

    def _call(self, name: str, *arguments: Any) -> Future[Any]:
        number = next(self.numbers)
        future: Future[Any] = Future()
        self.calls[number] = future
        self._send("call", number, name, arguments)
        if self.ended.done():
            self._give_back()
        return future

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
        future = self.calls.pop(number)
        if not future.set_running_or_notify_cancel():
            return
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
            name = signal.Signals(-code).name
            return DirlError(
                f"the engine was killed by {name}; if nobody did, the machine may have run out of memory: give a"
                " smaller rollout.max_batch or serve.max_length"
            )
        return DirlError(FAILED)


class EngineHost:
    """The engine's end: obeys orders, and reports."""

    def __init__(self, connection: Connection, engine: EngineThread) -> None:
        self.connection = connection
        self.engine = engine
        self.open = OpenQueries()
        self.news: News = []
        self.reported = EngineState.of(engine)
        self.reported_at = 0.0
        self.sending = Lock()

    # Orders

    def submit(
        self,
        number: int,
        prompt_ids: list[int],
        samples: range,
        decoding: Decoding,
        weights: WeightsId | None,
        answer_ids: Sequence[int],
    ) -> None:
        query = Query(prompt_ids, samples, decoding, partial(self._take, number), weights, answer_ids)
        self.open.add(number, query)
        self.engine.submit(query)

    def withdraw(self, number: int, samples: list[int]) -> None:
        if query := self.open.get(number):
            self.open.close(number, samples)
            self.engine.withdraw(query, samples)

    def refuse_waiting(self) -> None:
        self.engine.refuse_waiting()

    def drop_running(self) -> None:
        self.engine.drop_running()

    def call(self, number: int, name: str, arguments: Sequence[Any]) -> None:
        future: Future[Any] = getattr(self.engine, name)(*arguments)
        future.add_done_callback(partial(self._tell_done, number))

    def stop(self) -> None:
        self.engine.stop()

    # In the engine's thread

    def report(self) -> None:
        """Tell what a forward has brought and how the engine is; of the mere number of forwards only now and then."""
        now = time.monotonic()
        state = EngineState.of(self.engine)
        is_as_told = replace(state, forwards=self.reported.forwards) == self.reported
        if self.news or not is_as_told or now > self.reported_at + REPORT:
            self.reported, self.reported_at = state, now
            news, self.news = self.news, []
            self.send("news", news, state)

    def _take(self, number: int, news: NewBlock | GivenUp) -> None:
        if isinstance(news, GivenUp) or news.stop_reason:
            self.open.close(number, [news.sample])
        self.news.append((number, news))

    def _tell_done(self, number: int, future: Future[Any]) -> None:
        self.report()  # of answers that it has given back
        error = future.exception()
        value = None if error else future.result()
        self.send("done", number, value, error, EngineState.of(self.engine))

    def send(self, *message: Any) -> None:
        with self.sending, suppress(OSError):  # of a server that is no more
            self.connection.send(message)


def run_engine(connection: Connection, begin: Callable[[], EngineThread]) -> None:
    """The engine's process, from its begin to its end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which the server gets too: what is under way is finished first
        signal.signal(number, signal.SIG_IGN)
    try:
        engine = begin()
        host = EngineHost(connection, engine)
        engine.after_turn = host.report
        opened = engine.start()
    except DirlError as error:
        connection.send(("ended", error))
        return
    host.send("opened", opened, EngineState.of(engine))

    Thread(target=obey, args=(connection, host), name="orders", daemon=True).start()
    engine.thread.join()
    failure = engine.ended.exception()
    if failure and not isinstance(failure, DirlError):
        traceback.print_exception(failure)
        failure = DirlError(FAILED)
    host.send("ended", failure)


def obey(connection: Connection, host: EngineHost) -> None:
    """Take the server's orders as they come."""
    try:
        while True:
            name, *arguments = connection.recv()
            getattr(host, name)(*arguments)
    except EOFError:
        os._exit(0)  # the server is no more, and nobody waits for what is under way
