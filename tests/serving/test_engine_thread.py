"""The engine's thread: what it holds while it sleeps, and that whoever waits for it hears of its end."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("starlette", reason="dirl serve wants starlette: make install brings it")

from dirl_cli.errors import DirlError
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.sampler import GivenUp, NewBlock
from dirl_cli.serving.engine import ASLEEP, FAILED, STOPPING, Query
from dirl_cli.serving.engine_thread import EngineThread
from dirl_cli.types import Decoding
from tests.helpers.served import speaking_lm


class Batch:
    """A batch with room for one answer, whose next step waits until it may."""

    slots, length = 1, 64

    def __init__(self, sampler):
        self.sampler = sampler
        self.answer = None

    def has_room(self, decoding):
        return self.answer is None

    def add(self, prompt, sample, prompt_ids, decoding, answer_ids):
        self.answer = prompt, sample

    def remove(self, prompt, sample):
        self.answer = None

    def step(self):
        self.sampler.stepping.set()
        assert self.sampler.may_step.wait(30)
        if self.sampler.fails:
            raise ZeroDivisionError
        (prompt, sample), self.answer = self.answer, None
        return [NewBlock(prompt, sample, [5], [1], [0.0], 1, 1, self.sampler.weights_version, "stop")]

    def close(self):
        pass


class Sampler:
    """A sampler whose batches are `Batch`."""

    lm = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, fails=False):
        self.fails = fails
        self.weights_version = 0
        self.stepping, self.may_step = threading.Event(), threading.Event()

    def open_batch(self, length):
        return Batch(self)

    def update_weights(self, named_tensors, version):
        if self.fails:
            raise ZeroDivisionError
        self.weights_version = version

    def sleep(self):
        pass

    def wake(self):
        pass


def query(news):
    return Query([20], range(1), Decoding(), news.append)


def test_asleep_nothing_of_the_batch_is_left_nor_after_other_weights():
    engine = EngineThread(NativeSampler(speaking_lm(), 2), 64)
    assert engine.start() == (2, 64)
    for change in (engine.sleep, lambda: engine.update_weights(lambda lm: {}, None)):
        forward = weakref.ref(engine.batch.forward)
        assert forward()
        change().result(30)
        gc.collect()
        assert forward() is None
        engine.wake().result(30)
    engine.stop()
    engine.thread.join(30)


def test_whatever_is_ordered_while_an_engine_fails_or_thereafter_hears_of_it():
    """One answer is under way when the engine fails, one waits, and a third, like a sleep, is still an order."""
    engine = EngineThread(sampler := Sampler(fails=True), 64)
    engine.start()
    news = []
    engine.submit(query(news))
    assert sampler.stepping.wait(30)
    engine.submit(query(news))
    asleep = engine.sleep()
    sampler.may_step.set()
    engine.thread.join(30)
    later, awake = query(news), engine.wake()
    engine.submit(later)
    assert [one.reason for one in news] == [FAILED] * 3
    for future in (asleep, awake):
        with pytest.raises(DirlError, match=FAILED):
            future.result(0)
    with pytest.raises(ZeroDivisionError):
        engine.ended.result(0)


def test_weights_that_the_engine_does_not_survive_are_told_and_never_counted():
    engine = EngineThread(Sampler(fails=True), 64)
    engine.start()
    with pytest.raises(DirlError, match=FAILED):
        engine.update_weights(lambda lm: {}, 9).result(30)
    engine.thread.join(30)
    assert engine.weights.version == 0


def test_what_waits_when_a_server_falls_asleep_or_comes_then_is_given_back():
    engine = EngineThread(sampler := Sampler(), 64)
    engine.start()
    first, second, third, fourth = [], [], [], []
    engine.submit(query(first))
    assert sampler.stepping.wait(30)
    asleep = engine.sleep()
    engine.submit(query(second))
    sampler.may_step.set()
    asleep.result(30)
    engine.submit(query(third))
    engine.wake().result(30)
    engine.submit(query(fourth))
    engine.sleep().result(30)  # when that is over
    assert [news.stop_reason for news in first] == ["stop"]
    assert [news.reason for news in second + third] == [ASLEEP, ASLEEP]
    assert isinstance(second[0], GivenUp) and len(fourth) == 1
    engine.stop()
    engine.thread.join(30)


def test_a_stop_comes_before_another_step():
    engine = EngineThread(sampler := Sampler(), 64)
    engine.start()
    news = []
    engine.submit(query(news))
    assert sampler.stepping.wait(30)
    engine.submit(query(news))
    engine.stop()
    sampler.may_step.set()
    engine.thread.join(30)
    assert engine.forwards == 1 and news[0].stop_reason == "stop"
    assert news[1].reason == STOPPING
