"""The engine's process, and its end of the pipe; see engine_process.py."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from threading import Lock, Thread
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.sampler import GivenUp, NewBlock
from dirl_cli.serving.engine import FAILED, Query
from dirl_cli.serving.engine_thread import EngineThread
from dirl_cli.serving.open_queries import OpenQueries
from dirl_cli.types import Decoding

REPORT = 0.1  # seconds after which the engine tells of itself where it has nothing else to tell

News = list[tuple[int, NewBlock | GivenUp]]
"""What has become of answers, with the number of the query."""


class EngineHost:
    """The engine's end: obeys orders, and reports."""

    def __init__(self, connection: Connection, engine: EngineThread) -> None:
        self.connection = connection
        self.engine = engine
        self.open = OpenQueries()
        self.calls: dict[int, Future[Any]] = {}
        self.news: News = []
        self.reported = engine.state
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
        future = self.calls[number] = getattr(self.engine, name)(*arguments)
        future.add_done_callback(partial(self._tell_done, number))

    def cancel(self, number: int) -> None:
        if future := self.calls.get(number):
            future.cancel()

    def stop(self) -> None:
        self.engine.stop()

    # In the engine's thread

    def report(self) -> None:
        """Tell what a forward has brought and how the engine is; of the mere number of forwards only now and then."""
        now = time.monotonic()
        state = self.engine.state
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
        del self.calls[number]
        if future.cancelled():
            return
        self.report()  # of answers that it has given back
        error = future.exception()
        value = None if error else future.result()
        self.send("done", number, value, error, self.engine.state)

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
    host.send("opened", opened, engine.state)

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
