"""Servers of a run's own that end are started again where they listened, and no more often than helps."""

import subprocess
import sys
import time

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.rollout import server_keeper
from dirl_cli.rollout.server_client import Patience
from dirl_cli.rollout.server_keeper import MOST_STARTS, ServerKeeper
from dirl_cli.rollout.server_pool import ServerPool
from dirl_cli.rollout.server_processes import ServerProcess
from dirl_cli.rollout.weight_push import DiskPush

SLEEPS = "import time; time.sleep(60)"


@pytest.fixture
def started(monkeypatch):
    """A keeper's start of a server runs a line of Python; what each was started with."""
    starts = []
    monkeypatch.setattr(server_keeper, "POLL", 0.01)

    def start(directory, environment):
        starts.append((directory, environment))
        directory.with_name(f"{directory.name}.log").touch()
        return ServerProcess(directory, subprocess.Popen([sys.executable, "-c", environment["CODE"]]))

    monkeypatch.setattr(server_keeper, "start_server", start)
    return starts


def wait_until(is_so):
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_that_is_killed_is_started_again_in_its_directory_with_its_environment(started, tmp_path, capsys):
    first, second = tmp_path / "0", tmp_path / "1"
    with ServerKeeper() as keeper:
        keeper.start(first, {"CODE": SLEEPS, "CUDA_VISIBLE_DEVICES": "4"})
        keeper.start(second, {"CODE": SLEEPS, "CUDA_VISIBLE_DEVICES": "5"})
        keeper.watch()
        keeper.servers[1].process.kill()
        wait_until(lambda: keeper.starts == [1, 2])
        assert started[2] == started[1]
        assert keeper.end() is None
    assert "server 1 of the run has ended (killed by SIGKILL) and is started again" in capsys.readouterr().err
    assert all(server.process.returncode for server in keeper.servers)


def test_servers_that_end_again_and_again_end_the_run_at_once(started, tmp_path):
    with ServerKeeper() as keeper:
        keeper.start(tmp_path / "0", {"CODE": "raise SystemExit(1)"})
        keeper.watch()
        pool = ServerPool([], 4, Patience(60, 60, 3600), DiskPush(), keeper.end)
        pool.heard()
        wait_until(keeper.end)
        with pytest.raises(DirlError, match=r"all servers of the run have ended, after 4 starts each: .* same command"):
            pool.require_hope()
    assert len(started) == MOST_STARTS


def test_where_one_server_is_left_nothing_is_over(started, tmp_path):
    with ServerKeeper() as keeper:
        keeper.start(tmp_path / "0", {"CODE": "raise SystemExit(1)"})
        keeper.start(tmp_path / "1", {"CODE": SLEEPS})
        keeper.watch()
        wait_until(lambda: keeper.starts[0] == MOST_STARTS)
        keeper.servers[0].process.wait()
        assert keeper.end() is None


def test_a_process_that_has_started_no_servers_knows_of_no_end():
    assert ServerKeeper().end() is None
