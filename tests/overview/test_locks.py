"""Whether a run is alive is told by its lock, and by whom that is held."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from dirl_cli.overview.locks import Holder, lock_holder

HOLD = """
import fcntl, subprocess, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
heir = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.fileno()])
print(heir.pid, flush=True)
sys.stdin.read()
"""


def test_a_lock_that_nobody_holds_and_one_that_is_not_there_have_no_holder(tmp_path):
    assert lock_holder(tmp_path / "lock") is None
    (tmp_path / "lock").touch()
    assert lock_holder(tmp_path / "lock") is None


def test_a_lock_of_this_process_is_this_processs(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert lock_holder(tmp_path / "lock") == Holder(os.getpid(), "alive")
        # Looking does not let go of it.
        assert lock_holder(tmp_path / "lock") == Holder(os.getpid(), "alive")


@pytest.mark.skipif(sys.platform != "linux", reason="who holds a lock is told by /proc")
def test_what_a_dead_process_left_behind_is_named_and_a_suspended_one_too(tmp_path):
    lock = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    heir = int(process.stdout.readline())
    try:
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: lock_holder(lock) == Holder(process.pid, "suspended"))
        process.kill()
        process.wait()
        wait_until(lambda: lock_holder(lock) == Holder(process.pid, "dead", (heir,)))
    finally:
        process.kill()
        os.kill(heir, signal.SIGKILL)
    wait_until(lambda: lock_holder(lock) is None)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
