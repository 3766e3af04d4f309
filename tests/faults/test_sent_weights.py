"""Runs that send their servers new weights (rollout.push=broadcast), whatever happens in the middle of it."""

import signal
import time
from contextlib import contextmanager

import httpx
import psutil
import pytest

pytest.importorskip("starlette", reason="servers want starlette: make install brings it")

from dirl_cli.rollout import weight_push
from tests.faults.served_runs import impatient, own_words, run_of, served_config
from tests.faults.trials import Child, config, finished

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

BROADCAST = ("rollout.push=broadcast", "rollout.push_timeout=80")


def in_small_parts() -> None:
    """Sends weights in so many parts that there is time to disturb it."""
    impatient()
    weight_push.PART = 64


def wait_for_push(servers) -> None:
    """Until both servers are being sent weights."""
    while len(received(servers)) < 2:
        time.sleep(0.001)


def received(servers) -> list:
    return [path for path in servers.received.rglob("*") if path.is_file()]


@contextmanager
def broken_push(word, servers, out, expected):
    """A run, of which a push has begun to two servers; in the end whether it has come to what is expected."""
    survives: list[int] = []
    with run_of(served_config(word, servers.url, out, *BROADCAST), out, survives, expected, in_small_parts) as child:
        wait_for_push(servers)
        yield child, survives


def left_out(child, servers) -> set[int]:
    """Which servers the run has ever left out."""
    return {number for number, port in enumerate(servers.ports) if f":{port} is left out" in child.told}


def versions(servers) -> list[int]:
    return [httpx.get(f"http://127.0.0.1:{port}/health").json()["weights_version"] for port in servers.ports]


def test_a_run_that_sends_weights_ends_with_the_bytes_of_one_that_samples_itself(
    word, servers, expected, tmp_path, tell
):
    sent = finished("rl", served_config(word, servers.url, tmp_path / "run", *BROADCAST), tmp_path / "run")
    out = tmp_path / "own"
    own = finished("rl", config("rl", word, *own_words(out), *BROADCAST), out)
    same = sum(outcome == expected for outcome in (sent, own))
    tell("none: weights that are sent to two servers, and to two of the run's own", 2, same)
    assert not received(servers)


def test_a_server_that_is_killed_while_it_is_sent_weights(word, servers, expected, tmp_path, tell):
    with broken_push(word, servers, tmp_path / "run", expected) as (child, survives):
        servers.kill(0)
        child.wait_for("step 4/")
        servers.start(0)
        servers.wait()
    assert left_out(child, servers) == {0}
    tell("kill -9 of a server in the middle of a broadcast", 1, sum(survives))
    assert not received(servers)


def test_a_server_that_hangs_while_it_is_sent_weights(word, servers, expected, tmp_path, tell):
    with broken_push(word, servers, tmp_path / "run", expected) as (child, survives):
        server = psutil.Process(servers.children[1].pid)
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        child.wait_for("step 4/")
        for process in processes:
            process.send_signal(signal.SIGCONT)
    assert left_out(child, servers) == {1}
    tell("a server hangs (SIGSTOP) in the middle of a broadcast", 1, sum(survives))


def test_a_trainer_that_is_killed_while_it_sends_weights(word, servers, expected, tmp_path, tell):
    out = tmp_path / "run"
    cfg = served_config(word, servers.url, out, *BROADCAST)
    child = Child("rl", cfg, out, in_small_parts).wait_for("step 2/")
    wait_for_push(servers)
    before = versions(servers)
    assert child.kill()
    until = time.monotonic() + 30
    while received(servers) and time.monotonic() < until:
        time.sleep(0.01)
    assert not received(servers) and versions(servers) == before
    tell("kill -9 of a run in the middle of a broadcast", 1, int(finished("rl", cfg, out) == expected))
