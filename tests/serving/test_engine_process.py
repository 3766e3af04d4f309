"""An engine in a process of its own: the same answers, and what becomes of either process without the other."""

import os
import signal
import subprocess
import sys
from functools import partial
from queue import SimpleQueue

import psutil
import pytest

from dirl_cli.errors import DirlError
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.sampler import GivenUp
from dirl_cli.serving.engine import ASLEEP, FAILED, OtherWeights, Query
from dirl_cli.serving.engine_process import EngineProcess
from dirl_cli.serving.engine_thread import EngineThread
from dirl_cli.types import Decoding
from tests.helpers.paths import ROOT
from tests.helpers.served import speaking_lm, wait_until

PROMPT = [20, 21, 22]
DECODING = Decoding(temperature=1.0, max_new_tokens=16, seed=3)


def engine() -> EngineThread:
    return EngineThread(NativeSampler(speaking_lm(), 2), 64)


def failing_engine() -> EngineThread:
    made = engine()
    made._step = partial(divmod, 1, 0)  # type: ignore[assignment]
    return made


def no_engine() -> EngineThread:
    raise DirlError("there is no such model: give another")


def new_weights(lm):
    return dict(speaking_lm(1).model.named_parameters())


def asked(process: EngineProcess, samples: range = range(2), weights: WeightsId | None = None) -> list:
    """What becomes of answers to PROMPT, until all are over."""
    news: SimpleQueue = SimpleQueue()
    process.submit(Query(PROMPT, samples, DECODING, news.put, weights))
    found, left = [], len(samples)
    while left:
        found.append(news.get(timeout=60))
        left -= isinstance(found[-1], GivenUp) or found[-1].stop_reason is not None
    return found


def token_ids(news: list, sample: int) -> list[int]:
    return [token for one in news if one.sample == sample for token in one.token_ids]


@pytest.fixture(scope="module")
def process():
    """One for several tests, since it takes seconds to begin."""
    with EngineProcess(engine) as running:
        assert running.start() == (2, 64)
        yield running
    assert running.process.exitcode == 0


def test_withdrawn_answers_make_room_and_an_idle_engine_is_told_to_be(process):
    query = Query(PROMPT, range(2), Decoding(max_new_tokens=48, denoising_steps=4), lambda news: None)
    process.submit(query)
    wait_until(lambda: process.state.forwards > 0)
    process.withdraw(query, range(2))
    wait_until(lambda: process.state.running == process.state.waiting == 0)
    assert asked(process)


def test_its_answers_are_the_samplers_through_sleep_and_other_weights(process):
    lm = speaking_lm()
    [expected] = NativeSampler(lm).sample([PROMPT], 2, lm.decoding(DECODING))
    news = asked(process)
    assert [token_ids(news, sample) for sample in (0, 1)] == [one.token_ids for one in expected]
    wait_until(lambda: process.state.running == 0)
    assert process.state.forwards > 0

    process.sleep().result(60)
    assert process.state.is_asleep
    assert [one.reason for one in asked(process)] == [ASLEEP] * 2
    process.wake().result(60)
    assert process.update_weights(new_weights, 7, "its sum").result(60) == 7
    assert process.state.weights == WeightsId(7, "its sum") and not process.state.is_asleep
    new = speaking_lm(1)
    [expected] = NativeSampler(new).sample([PROMPT], 2, new.decoding(DECODING))
    assert token_ids(asked(process), 1) == expected[1].token_ids
    assert isinstance(asked(process, range(1), WeightsId(3))[0], OtherWeights)


def test_weights_that_nobody_waits_for_any_more_do_not_come(process):
    """They wait for an answer that is under way, and whoever brings them hangs up meanwhile."""
    news: SimpleQueue = SimpleQueue()
    long = Decoding(max_new_tokens=56, denoising_steps=4)
    process.submit(Query(PROMPT, range(1), long, news.put))
    wait_until(lambda: process.state.running)
    before = process.state.weights
    assert process.update_weights(new_weights, 8).cancel()
    while not news.get(timeout=60).stop_reason:
        pass
    process.sleep().result(60)
    process.wake().result(60)
    assert process.state.weights == before


def test_a_killed_engine_is_told_and_whatever_waits_or_comes_hears_of_it():
    process = EngineProcess(engine)
    process.start()
    os.kill(process.process.pid, signal.SIGKILL)
    assert "the engine was killed by SIGKILL" in asked(process)[0].reason
    with pytest.raises(DirlError, match="killed by SIGKILL; if nobody did"):
        process.ended.result(60)
    with pytest.raises(DirlError, match="killed by SIGKILL"):
        process.wake().result(60)


@pytest.mark.slow
def test_what_ends_an_engine_is_told_in_the_servers_process(capfd):
    with pytest.raises(DirlError, match="there is no such model: give another"):
        EngineProcess(no_engine).start()
    failing = EngineProcess(failing_engine)
    failing.start()
    assert asked(failing)[0].reason == FAILED
    with pytest.raises(DirlError, match=FAILED):
        failing.ended.result(60)
    assert "ZeroDivisionError" in capfd.readouterr().err


SERVER = """
import os, signal
from tests.serving.test_engine_process import EngineProcess, engine
if __name__ == "__main__":
    running = EngineProcess(engine)
    running.start()
    print(running.process.pid, flush=True)
    signal.pause()
"""


@pytest.mark.slow
def test_an_engine_ends_with_its_server_though_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        pid = int(server.stdout.readline())
        assert psutil.pid_exists(pid)
        server.kill()
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
