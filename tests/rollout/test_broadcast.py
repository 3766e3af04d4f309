"""Bytes that go from one process to several arrive as they are, and nothing is left behind."""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from dirl_cli.rollout.meeting import address_towards
from dirl_cli.rollout.transfers import TransferFailed
from tests.helpers.meeting_room import LONG, MEETING, Room


@pytest.fixture
def room(tmp_path):
    return Room(tmp_path)


def test_all_bytes_arrive_at_everybody(room):
    async def pushes():
        outcomes = [await room.meet(MEETING) for _ in range(2)]
        await room.close()
        return outcomes

    others = set(psutil.Process().children())  # of other tests
    assert asyncio.run(pushes()) == [[{"is_whole": True}] * 3] * 2
    assert room.received() == [True, True]
    assert set(psutil.Process().children()) <= others


def test_a_port_where_nobody_listens_is_a_failure_of_its_own(room):
    async def meet_nobody():
        async with room.transfers[1].process() as process:
            process.begin(room.files[1], replace(MEETING, port=9, rank=1, step=1))
            return await process.news()

    with pytest.raises(TransferFailed, match=r"127.0.0.1 port 9: .*timed out") as failure:
        asyncio.run(meet_nobody())
    assert failure.value.is_own


def test_it_listens_at_the_address_that_it_is_given_and_no_other(room):
    async def addresses():
        async with room.transfers[0].process() as process:
            process.begin(room.files[0], MEETING)
            await process.news()
            await asyncio.sleep(0.5)  # for gloo to listen too, which waits for the others now
            return {line.laddr.ip for line in psutil.Process(process.process.pid).net_connections() if line.raddr == ()}

    assert asyncio.run(addresses()) == {"127.0.0.1"}
    assert address_towards("127.0.0.1", 80) == "127.0.0.1"


def test_what_receives_ends_with_who_has_started_it_and_leaves_no_files(room, tmp_path):
    directory = tmp_path / "received"
    directory.mkdir()
    command = [sys.executable, "-m", "dirl_cli.rollout.broadcast"]
    sender, receiver = (
        subprocess.Popen([*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for arguments in ([], [str(directory)])
    )

    def begin(process, path, **meeting):
        line = {"path": str(path), "meeting": {**vars(replace(LONG, size=2, step=20)), **meeting}}
        print(json.dumps(line), file=process.stdin, flush=True)

    begin(sender, room.files[0])
    begin(receiver, directory / "weights", rank=1, port=json.loads(sender.stdout.readline())["port"])
    while not (directory / "weights").exists():
        time.sleep(0.001)
    receiver.stdin.close()  # as by the end of who holds the other end
    assert receiver.wait(10) == 0 and not directory.exists()
    assert "failure" in json.loads(sender.stdout.readline())
    sender.stdin.close()
    assert sender.wait(10) == 0
