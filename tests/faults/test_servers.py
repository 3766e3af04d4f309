"""A run that samples with servers ends with the bytes of one that samples itself, whatever becomes of a server."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("starlette", reason="servers want starlette: make install brings it")

from tests.faults.served_runs import impatient, own_words, run_of, served_config
from tests.faults.trials import RL, Child, config, finished, result
from tests.helpers.flaky_network import line_to

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def test_a_server_that_is_killed_in_mid_rollout(word, servers, expected, tmp_path, tell):
    survives: list[int] = []
    with run_of(served_config(word, servers.url, tmp_path / "run"), tmp_path / "run", survives, expected) as child:
        for number, step in ((0, 3), (1, 4)):
            servers.kill(number)
            child.wait_for(f"step {step}/")
            servers.start(number)
            servers.wait()
    tell("kill -9 of one of two servers in mid-rollout, and then of the other", 1, sum(survives))


def test_a_server_that_hangs(word, servers, expected, tmp_path, tell):
    survives: list[int] = []
    with run_of(served_config(word, servers.url, tmp_path / "run"), tmp_path / "run", survives, expected) as child:
        servers.children[1].send(signal.SIGSTOP)
        child.wait_for("step 4/")
        servers.children[1].send(signal.SIGCONT)
    tell("a server hangs (SIGSTOP) for two steps", 1, sum(survives))


def test_a_push_that_fails_half_way(word, servers, expected, tmp_path, tell):
    survives: list[int] = []
    out = tmp_path / "run"
    with run_of(served_config(word, servers.url, out), out, survives, expected):
        while not (out / "weights/version-000003").exists():
            time.sleep(0.001)
        servers.kill(0)
        servers.start(0)
        servers.wait()
    tell("kill -9 of a server while weights are pushed", 1, sum(survives))


def test_a_network_that_drops(word, servers, expected, tmp_path, tell):
    survives: list[int] = []
    out = tmp_path / "run"
    with line_to(f"http://127.0.0.1:{servers.ports[0]}") as near, line_to(f"http://x:{servers.ports[1]}") as far:
        cfg = served_config(word, f"rollout.url=[{near.address},{far.address}]", out)
        with run_of(cfg, out, survives, expected) as child:
            near.cut()
            far.cut()
            time.sleep(1)
            near.mend()
            child.wait_for("step 4/")
            far.mend()
    tell("the network to all servers drops for a second, to one of them for two steps", 1, sum(survives))


def test_a_trainer_that_is_killed_while_servers_run_on(word, servers, expected, tmp_path, tell):
    out = tmp_path / "run"
    cfg = served_config(word, servers.url, out)
    for step in (1, 3):
        assert Child("rl", cfg, out, impatient).wait_for(f"step {step}/").kill()
    tell("kill -9 of a run while its servers run on", 2, 2 * (finished("rl", cfg, out) == expected))


def test_no_server_left(word, servers, expected, tmp_path, tell):
    out = tmp_path / "run"
    cfg = served_config(word, servers.url, out, "rollout.patience=2")
    child = Child("rl", cfg, out, impatient).wait_for("step 2/")
    servers.kill(0)
    servers.kill(1)
    code = child.end()
    last = child.told.splitlines()[-1]
    assert code == 1 and "no server has answered for 2 s" in last and "give the same command" in last, child.told
    servers.start(0)
    servers.start(1)
    servers.wait()
    tell(
        "all servers are killed: a sentence, and the same command goes on", 1, int(finished("rl", cfg, out) == expected)
    )


def test_two_processes_and_two_servers(word, servers, tmp_path, tell):
    """The whole of it, by the command: what two processes learn from servers is what they learn by themselves."""
    ways = {
        "own": ["rollout=native"],
        "served": ["rollout=server", servers.url, f"rollout.directory={tmp_path}/weights"],
        "started": ["rollout=server", "rollout.servers=2"],
    }
    results = []
    for name, words in ways.items():
        command = [Path(sys.executable).with_name("dirl"), "rl", *RL, word, "gpus=2", "launch=cpu_gloo", "steps=4"]
        command += [*words, "rollout.max_batch=1", f"out={tmp_path}/{name}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        results.append(result(tmp_path / name))
    same = sum(other == results[0] for other in results[1:])
    tell("none: two processes and two servers, beside two that sample themselves", 2, same)


def started_servers(word: str, out: Path) -> tuple[Child, list[psutil.Process]]:
    """A run with two servers of its own, at its third step, and the processes that they are."""
    child = Child("rl", config("rl", word, *own_words(out)), out, impatient).wait_for("step 2/")
    servers = [process for process in psutil.Process(child.pid).children() if "beside" in process.cmdline()]
    assert len(servers) == 2, child.told
    return child, servers


def all_end(processes: list[psutil.Process]) -> bool:
    """Whether they do, within seconds; one that is dead and was not asked how it ended runs no more."""
    until = time.monotonic() + 20
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_servers_of_its_own_give_the_same_bytes_and_end_with_the_run(word, expected, tmp_path, tell):
    out = tmp_path / "run"
    child, servers = started_servers(word, out)
    keys = {process.environ()["DIRL_SERVE_KEY"] for process in servers}
    assert child.end() == 0, child.told
    assert all_end(servers) and result(out) == expected

    [key] = keys
    files = [file for file in out.rglob("*") if file.is_file()]
    assert out / "servers/0.log" in files and len(key) > 20
    assert not [file for file in files if key.encode() in file.read_bytes()] and key not in child.told
    tell("none: two servers that the run has started", 1, 1)


def test_servers_of_its_own_end_with_a_trainer_that_is_killed_or_stopped(word, expected, tmp_path, tell):
    survived = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        out = tmp_path / number.name
        child, servers = started_servers(word, out)
        child.send(number)
        child.end()
        survived += all_end(servers)
    again = Child("rl", config("rl", word, *own_words(out)), out)
    assert again.end() == 0 and result(out) == expected, again.told
    tell("SIGTERM and kill -9 of a run with servers of its own", 2, survived)


def test_servers_of_its_own_that_are_killed_are_started_again(word, expected, tmp_path, tell):
    out = tmp_path / "run"
    child, servers = started_servers(word, out)
    for server in servers:
        server.kill()
    assert child.end() == 0, child.told
    for number in (0, 1):
        assert f"server {number} of the run has ended (killed by SIGKILL) and is started again" in child.told
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(out / "servers") in command]
    tell("kill -9 of both servers that the run has started", 1, int(result(out) == expected))
