"""The thread that owns an engine: it takes newcomers between forwards, and hands out blocks as they become full.

Nothing else touches the sampler. Other threads leave orders, which are taken between two forwards. What changes the
weights waits until nothing is under way, so that no answer has two versions of them.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from itertools import count
from threading import Lock, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from dirl_cli.errors import DirlError
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.sampler import GivenUp, LiveBatch, Sampler
from dirl_cli.serving.engine import (
    ASLEEP,
    FAILED,
    STOPPING,
    EngineState,
    OtherWeights,
    Query,
    ReadWeights,
    other_weights,
)

T = TypeVar("T")


class EngineThread:
    """See `Engine`. Runs `sampler` in a thread of its own, with room for `length` tokens of a prompt and its answer.

    own_weights: the sampler gives its weights away while it sleeps, so that they are kept here. after_turn: called in
    the thread after each forward, and at the end.
    """

    def __init__(self, sampler: Sampler, length: int, own_weights: bool = False) -> None:
        self.sampler = sampler
        self.length = length
        self.own_weights = own_weights
        self.weights = WeightsId(sampler.weights_version)
        self.batch: LiveBatch | None = None
        self.is_asleep = False
        self.kept: dict[str, Tensor] | None = None  # its own weights, while it sleeps
        self.forwards = 0  # steps of the engine

        self.orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.waiting: deque[tuple[Query, int]] = deque()  # with the index of the sample
        self.running: dict[tuple[int, int], Query] = {}  # by prompt number and sample
        self.numbers = count()
        self.when_idle: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.is_stopped = False
        self.opened: Future[tuple[int, int]] = Future()  # slots and length of the first batch
        self.ended: Future[None] = Future()
        self.end = STOPPING
        self.after_turn: Callable[[], None] = lambda: None
        self.giving_back = Lock()
        self.thread = Thread(target=self._run, name="engine", daemon=True)

    # From any thread

    def start(self) -> tuple[int, int]:
        """Start the thread and wait for its first batch: its slots and its length.

        Raises what keeps it from opening one.
        """
        self.thread.start()
        return self.opened.result()

    @property
    def state(self) -> EngineState:
        return EngineState(self.weights, self.is_asleep, self.forwards, len(self.running), len(self.waiting))

    def submit(self, query: Query) -> None:
        self._order(partial(self._submit, query))

    def withdraw(self, query: Query, samples: Iterable[int]) -> None:
        self.orders.put(partial(self._withdraw, query, set(samples)))

    def refuse_waiting(self) -> None:
        self.orders.put(partial(self._refuse_waiting, STOPPING))

    def drop_running(self) -> None:
        self.orders.put(self._drop_running)

    def sleep(self) -> Future[None]:
        return self._do_when_idle(self._sleep)

    def wake(self) -> Future[None]:
        return self._do_when_idle(self._wake)

    def update_weights(self, read: ReadWeights, version: int | None, sha256: str | None = None) -> Future[int]:
        return self._do_when_idle(partial(self._update_weights, read, version, sha256))

    def stop(self) -> None:
        self.orders.put(self._stop)

    def _do_when_idle(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._order(lambda: self.when_idle.append((work, future)))
        return future

    def _order(self, order: Callable[[], None]) -> None:
        """Leave an order whose answer somebody waits for. Where the thread is over, it is given back at once."""
        self.orders.put(order)
        if self.ended.done():
            self._give_back()

    # In the engine's thread

    def _run(self) -> None:
        try:
            batch = self._open()
            self.opened.set_result((batch.slots, batch.length))
            del batch  # which sleeping has to free
            while True:
                self._take_orders()
                if self.is_stopped:
                    break
                self._do_idle_work()
                self._admit()
                if self.running:
                    self._step()
                self.after_turn()
        except BaseException as error:  # raised again by whoever waits for the end
            self.end = str(error) if isinstance(error, DirlError) else FAILED
            self.batch = None
            if not self.opened.done():
                self.opened.set_exception(error)
            self.ended.set_exception(error)
        else:
            self.batch = None
            self.ended.set_result(None)
        self._give_back()  # after `ended`, so that whoever comes later sees that it is over
        self.after_turn()

    def _take_orders(self) -> None:
        """Do what was ordered meanwhile; wait for an order where there is nothing else to do."""
        can_begin = self.waiting and not self.is_asleep
        if not (self.running or self.when_idle or can_begin):
            self.orders.get()()
        while True:
            try:
                order = self.orders.get_nowait()
            except queue.Empty:
                return
            order()

    def _do_idle_work(self) -> None:
        while self.when_idle and not self.running:
            work, future = self.when_idle[0]
            if future.set_running_or_notify_cancel():  # whoever ordered it is still there
                try:
                    future.set_result(work())
                except DirlError as error:
                    future.set_exception(error)
            self.when_idle.popleft()  # now, so that what the engine does not survive is given back

    def _admit(self) -> None:
        """Begin what waits, in order, as far as there is room; nothing while somebody wants the engine idle."""
        batch = self.batch
        while batch and self.waiting and not self.when_idle:
            query, sample = self.waiting[0]
            if not batch.has_room(query.decoding):
                return
            self.waiting.popleft()
            batch.add(query.number, sample, query.prompt_ids, query.decoding, query.answer_ids)
            self.running[query.number, sample] = query

    def _step(self) -> None:
        if self.batch is None:
            return
        self.forwards += 1
        for news in self.batch.step():
            query = self.running[news.prompt, news.sample]
            if isinstance(news, GivenUp) or news.stop_reason:
                del self.running[news.prompt, news.sample]
            query.deliver(news)

    def _submit(self, query: Query) -> None:
        query.number = next(self.numbers)
        if self.is_asleep:
            for sample in query.samples:
                query.deliver(GivenUp(query.number, sample, ASLEEP))
            return
        self._wait(query, query.samples)

    def _wait(self, query: Query, samples: Iterable[int]) -> None:
        """Let answers wait for room, or give them back where they are asked of other weights."""
        reason = other_weights(query.weights, self.weights)
        for sample in samples:
            if reason:
                query.deliver(OtherWeights(query.number, sample, reason))
            else:
                self.waiting.append((query, sample))

    def _withdraw(self, query: Query, samples: set[int]) -> None:
        self.waiting = deque(
            (other, sample) for other, sample in self.waiting if other is not query or sample not in samples
        )
        for sample in samples:
            if self.running.pop((query.number, sample), None) and self.batch:
                self.batch.remove(query.number, sample)

    def _refuse_waiting(self, reason: str) -> None:
        while self.waiting:
            query, sample = self.waiting.popleft()
            query.deliver(GivenUp(query.number, sample, reason))

    def _drop_running(self) -> None:
        for (number, sample), query in list(self.running.items()):
            query.deliver(GivenUp(number, sample, STOPPING))
            if self.batch:
                self.batch.remove(number, sample)
        self.running.clear()

    def _stop(self) -> None:
        self.is_stopped = True

    def _give_back(self) -> None:
        """Tell everybody who still waits, or has just come, that nothing comes. From any thread, once it is over."""
        with self.giving_back:
            while not self.orders.empty():
                self.orders.get_nowait()()
            self._refuse_waiting(self.end)
            for (number, sample), query in self.running.items():
                query.deliver(GivenUp(number, sample, self.end))
            self.running.clear()
            for _, future in self.when_idle:
                if future.running() or future.set_running_or_notify_cancel():
                    future.set_exception(DirlError(self.end))
            self.when_idle.clear()

    def _open(self) -> LiveBatch:
        if self.sampler.lm.device.type == "cuda":
            torch.cuda.set_device(self.sampler.lm.device)  # a thread begins on the first GPU
        batch = self.batch = self.sampler.open_batch(self.length)
        return batch

    def _close(self) -> None:
        if self.batch:
            self.batch.close()
        self.batch = None

    def _sleep(self) -> None:
        if self.is_asleep:
            return
        if self.own_weights:
            self.kept = {name: tensor.detach().cpu() for name, tensor in self.sampler.lm.model.named_parameters()}
        self._close()
        self.sampler.sleep()
        self._fall_asleep()

    def _fall_asleep(self) -> None:
        """Answer nothing until `wake`: what waits would wait for somebody else."""
        self.is_asleep = True
        self._refuse_waiting(ASLEEP)

    def _wake(self) -> None:
        if not self.is_asleep:
            return
        self.sampler.wake()
        if self.kept:
            self.sampler.update_weights(self.kept.items(), self.weights.version)
            self.kept = None
        self._open()
        self.is_asleep = False

    def _update_weights(self, read: ReadWeights, version: int | None, sha256: str | None) -> int:
        version = self.weights.version + 1 if version is None else version
        weights = WeightsId(version, sha256)
        if sha256 and weights == self.weights:
            return version  # several processes of a run may each bring them

        # Keys and values of the old weights end with their batch.
        named_tensors = read(self.sampler.lm)
        if self.kept:
            self.kept = named_tensors  # which it takes when it wakes
        else:
            self._close()
            self.sampler.update_weights(named_tensors.items(), version)
        self.weights = weights
        waiting = self.waiting
        self.waiting = deque()
        for query, sample in waiting:
            self._wait(query, [sample])
        if not self.is_asleep:
            self._reopen()
        return version

    def _reopen(self) -> None:
        """Open a batch once more; where that fails, as for want of memory, it is as if it slept, and can be woken."""
        try:
            self._open()
        except DirlError:
            self._fall_asleep()
            raise
