"""Weights that are sent to servers: the same answers as over a disk, and one server's fault is not another's."""

import asyncio
import tempfile
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="servers want starlette: make install brings it")

from dirl_cli.errors import DirlError
from dirl_cli.rollout import server_pool, server_sampler, weight_push
from dirl_cli.rollout.engines import Servers
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.pooled_server import PooledServer
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.server_client import BrokenOff, ServerFailed
from dirl_cli.rollout.weight_push import BroadcastPush, Delivery, meeting_host
from dirl_cli.types import Decoding
from tests.helpers.farm import PATIENCE, answers_of, farm, read_one_by_one
from tests.helpers.served import served, speaking_lm, wait_until

WEIGHTS = WeightsId(3, "a" * 64)


@pytest.fixture
def lm():
    return speaking_lm(3)


@pytest.fixture
def received(tmp_path, monkeypatch):
    """Where servers put what they are sent."""
    directory = tmp_path / "received"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def files_in(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_servers_that_are_sent_weights_answer_as_the_sampler_does_and_miss_none_for_anothers_fault(
    lm, tmp_path, received, monkeypatch
):
    """One of three servers is cut off in the middle of a push, and taken back later."""
    read_one_by_one(monkeypatch)
    monkeypatch.setattr(server_pool, "FIRST_PAUSE", 0.02)
    decoding = lm.decoding(Decoding(temperature=1.0, max_new_tokens=12))
    new = speaking_lm(4)
    push = BroadcastPush("127.0.0.1", 60)
    with farm(lm, tmp_path, 3, replace(PATIENCE, push=60, outage=60), push=push) as three:
        three.sampler.update_weights(lm.model.named_parameters(), 0)
        assert answers_of(three.sampler, decoding) == answers_of(NativeSampler(lm, 1), decoding)
        assert not files_in(received)
        size = (tmp_path / "weights/version-000000/model.safetensors").stat().st_size

        monkeypatch.setattr(weight_push, "PART", max(size // 2_000, 1))
        cut = asyncio.run_coroutine_threadsafe(cut_once_it_receives(three.lines[1], received), three.sampler.loop)
        three.sampler.update_weights(new.model.named_parameters(), 1)
        assert cut.done() and [three.is_up(number) for number in range(3)] == [True, False, True]
        assert [served.engine.weights.version for served in three.servers] == [1, 0, 1]

        monkeypatch.setattr(weight_push, "PART", 2**20)
        three.lines[1].mend()
        wait_until(lambda: three.is_up(1))
        of_new = answers_of(NativeSampler(new, 1), decoding)
        assert {
            key: replace(answer, weights_version=0) for key, answer in answers_of(three.sampler, decoding).items()
        } == of_new
        assert not files_in(received)
    assert not list(received.iterdir())


async def cut_once_it_receives(line, directory):
    while len(files_in(directory)) < 3:
        await asyncio.sleep(0.001)
    line.cut()


def test_bytes_that_are_not_what_their_sum_says_are_taken_by_nobody(lm, tmp_path, received, monkeypatch):
    write_weights = server_sampler.write_weights
    push = BroadcastPush("127.0.0.1", 60)
    with farm(lm, tmp_path, 1, replace(PATIENCE, push=60, outage=0.5), push=push) as one:
        one.sampler.update_weights(lm.model.named_parameters(), 0)
        before = one.servers[0].engine.weights
        monkeypatch.setattr(
            server_sampler,
            "write_weights",
            lambda *arguments: (write_weights(*arguments)[0], WeightsId(1, "0" * 64)),
        )
        with pytest.raises(DirlError, match=r"no server has answered for 0.5 s .* is not what its SHA-256 says"):
            one.sampler.update_weights(speaking_lm(4).model.named_parameters(), 1)
        assert one.servers[0].engine.weights == before and not files_in(received)


MEETING = {"host": "127.0.0.1", "port": 9, "rank": 1, "size": 2, "bytes": 9, "part": 9, "join": 1, "step": 0.5}


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"broadcast": MEETING}, 400, "has a sha256 and no path"),
        ({"broadcast": MEETING, "sha256": "0" * 64, "path": "x"}, 400, "has a sha256 and no path"),
        ({"broadcast": [], "sha256": "0" * 64}, 400, "broadcast must hold host, port"),
        ({"broadcast": MEETING | {"bytes": 0}, "sha256": "0" * 64}, 400, "broadcast.bytes"),
        ({"broadcast": MEETING | {"host": 1}, "sha256": "0" * 64}, 400, "broadcast.host"),
        ({"broadcast": MEETING, "sha256": "0" * 64}, 503, "did not come whole (127.0.0.1 port 9: "),
    ],
)
def test_a_server_that_is_told_of_no_meeting_says_so_and_keeps_nothing(lm, received, body, status, sentence):
    with served(lm) as server:
        response = server.client.post("/update_weights", json=body)
        assert response.status_code == status and sentence in response.json()["error"]["message"]
        assert server.engine.weights == WeightsId(0) and not files_in(received)


class Client:
    """Takes weights, unless it is told not to when somebody is among those who get them with it."""

    def __init__(self, name, pushes, failure=None, bad_company=()):
        self.url = name
        self.pushes = pushes
        self.failure = failure
        self.bad_company = set(bad_company)

    async def take(self, source, weights, until):
        push = self.pushes[source["push"]]
        push.append(self.url)
        await asyncio.sleep(0)  # for all to come
        if self.failure:
            raise self.failure
        if self.bad_company & set(push):
            raise BrokenOff("broken off")


class CountedPush:
    """Tells each server which push it is. pushes: of each, who was given weights."""

    grace = 5

    def __init__(self, pushes):
        self.pushes = pushes

    @asynccontextmanager
    async def offered(self, path, servers):
        self.pushes.append([])
        yield [{"push": len(self.pushes) - 1}] * servers


def delivered(servers, pushes):
    """What came of each server, in order."""
    outcomes = asyncio.run(Delivery(CountedPush(pushes), Path(), WEIGHTS, 10).to(servers))
    return [outcomes[server] for server in servers]


def test_what_one_server_broke_off_for_others_is_pushed_again_without_it():
    pushes = []
    dead = ServerFailed("is gone")
    clients = [Client("a", pushes, bad_company="b"), Client("b", pushes, failure=dead), Client("c", pushes)]
    servers = [PooledServer(client) for client in clients]
    assert delivered(servers, pushes) == [None, dead, None]
    assert pushes == [["a", "b", "c"], ["a"]]
    assert not any(server.is_alone for server in servers)


def test_servers_that_do_not_reach_each_other_are_sent_their_weights_alone_from_then_on():
    pushes = []
    clients = [Client("a", pushes, bad_company="b"), Client("b", pushes, bad_company="a"), Client("c", pushes)]
    servers = [PooledServer(client) for client in clients]
    assert [type(outcome) for outcome in delivered(servers, pushes)] == [BrokenOff, BrokenOff, type(None)]
    assert [server.is_alone for server in servers] == [True, True, False]
    assert delivered(servers, pushes) == [None] * 3
    assert pushes == [["a", "b", "c"], ["a", "b"], ["c"], ["a"], ["b"]]


def test_the_address_that_servers_are_told_is_the_one_by_which_they_are_reached():
    assert meeting_host(["http://127.0.0.1:8000", "http://localhost:8001"]) == "127.0.0.1"
    with pytest.raises(DirlError, match=r"http://nowhere.invalid:1 has no address .* give rollout.push_host"):
        meeting_host(["http://127.0.0.1:8000", "http://nowhere.invalid:1"])


def test_an_address_that_is_not_this_machines_is_told(lm, tmp_path):
    told = pytest.raises(DirlError, match=r"weights cannot be sent \(192.0.2.1 .* give rollout.push_host an address")
    with farm(lm, tmp_path, 1, push=BroadcastPush("192.0.2.1", 60)) as one, told:
        one.sampler.update_weights(lm.model.named_parameters(), 0)


@pytest.mark.parametrize(
    ("engine", "push", "host", "sentence"),
    [
        ("native", "disk", "10.0.0.1", "give both or neither"),
        ("sglang", "broadcast", None, "SGLang's servers read weights from a disk"),
    ],
)
def test_a_way_that_there_is_not_is_told_before_anything_is_loaded(engine, push, host, sentence):
    with pytest.raises(DirlError, match=sentence):
        Servers(("http://a:1",), None, engine, "weights", 64, 60, 600, 600, push, host).require()
