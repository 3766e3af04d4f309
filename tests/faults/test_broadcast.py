"""Bytes that go from one process to several: all of them or none, whatever becomes of the others."""

import asyncio
import signal
import threading

import psutil
import pytest

from dirl_cli.rollout.transfers import TransferFailed
from tests.helpers.meeting_room import LONG, MEETING, Room

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture
def room(tmp_path):
    return Room(tmp_path)


def test_a_peer_that_hangs_is_waited_for_no_longer_than_a_step(room):
    async def push():
        outcomes = await room.meet(
            LONG, lambda processes: (processes[1].send_signal(signal.SIGSTOP), cut(processes[1]))
        )
        await room.close()
        return outcomes

    def cut(process):
        asyncio.get_running_loop().call_later(10, process.kill)  # so that its own line ends

    sender, hung, other = asyncio.run(push())
    assert isinstance(hung, TransferFailed) and hung.is_own
    for failure in (sender, other):
        assert isinstance(failure, TransferFailed) and not failure.is_own
    assert room.received() == [False, False]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_peer_that_is_killed_ends_the_push_of_all_and_the_next_one_succeeds(room, victim):
    async def push():
        outcomes = await room.meet(LONG, lambda processes: processes[victim].kill())
        again = await room.meet(MEETING)
        await room.close()
        return outcomes, again

    outcomes, again = asyncio.run(push())
    for rank, failure in enumerate(outcomes):
        assert isinstance(failure, TransferFailed) and failure.is_own == (rank == victim)
    assert again == [{"is_whole": True}] * 3 and room.received() == [True, True]


def test_all_bytes_arrive_and_a_hundred_pushes_leave_neither_files_nor_threads_nor_processes_behind(room):
    def open_things():
        here = psutil.Process()
        everyone = [here, *here.children()]
        return [(process.num_fds(), process.num_threads()) for process in everyone]

    async def pushes():
        counts = []
        for _ in range(101):
            assert await room.meet(MEETING) == [{"is_whole": True}] * 3
            counts.append(open_things())
        assert room.received() == [True, True]
        await room.close()
        return counts

    threads = threading.active_count()
    others = set(psutil.Process().children())
    counts = asyncio.run(pushes())
    assert counts[100] == counts[1]
    assert threading.active_count() == threads
    assert set(psutil.Process().children()) <= others
