"""A file that one process sends to two others, and what may be done to them meanwhile."""

import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import replace

from dirl_cli.rollout.meeting import Meeting
from dirl_cli.rollout.transfers import Transfers

MEETING = Meeting("127.0.0.1", 0, 0, size=3, bytes=3_000_001, part=2**16, join=60, step=20)
LONG = replace(MEETING, part=64, step=2)  # 47 thousand parts, so that there is time to disturb it


class Room:
    """Three transfers, of whom the first sends a file, and where they write it."""

    def __init__(self, directory) -> None:
        self.content = os.urandom(MEETING.bytes)
        self.files = [directory / f"{rank}" for rank in range(3)]
        self.files[0].write_bytes(self.content)
        self.transfers = [Transfers() for _ in self.files]

    async def meet(self, meeting, disturb=None):
        """What came of each; `disturb` is called with the processes once the last has received something."""
        async with AsyncExitStack() as stack:
            processes = [await stack.enter_async_context(transfers.process()) for transfers in self.transfers]
            processes[0].begin(self.files[0], meeting)
            port = (await processes[0].news())["port"]
            for rank in (1, 2):
                processes[rank].begin(self.files[rank], replace(meeting, rank=rank, port=port))
            if disturb:
                while not (self.files[2].exists() and self.files[2].stat().st_size):
                    await asyncio.sleep(0.001)
                disturb([process.process for process in processes])
            works = [process.news() for process in processes]
            return await asyncio.gather(*works, return_exceptions=True)

    async def close(self) -> None:
        for transfers in self.transfers:
            await transfers.close()

    def received(self) -> list[bool]:
        return [file.read_bytes() == self.content for file in self.files[1:]]
