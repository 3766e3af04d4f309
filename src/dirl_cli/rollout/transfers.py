"""Processes that send weights for this one, or receive them: see `broadcast.py`, whose meetings they are told of."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from dirl_cli.rollout.meeting import END, Meeting
from dirl_cli.rollout.server_client import KEY_VARIABLE

FREE = 2  # seconds in which a process lets go; one that does not is ended
QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL"}  # what goes wrong is told in a sentence, without torch's stack


class TransferFailed(Exception):  # noqa: N818
    """Why bytes did not arrive. is_own: for what is wrong here, and not with who else takes part."""

    def __init__(self, reason: str, is_own: bool) -> None:
        super().__init__(reason)
        self.is_own = is_own


class TransferProcess:
    """A process that is told of one meeting after another."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None

    def begin(self, path: Path, meeting: Meeting) -> None:
        """Have it send the file at `path`, or receive into it."""
        self._say(json.dumps({"path": str(path), "meeting": asdict(meeting)}))

    async def news(self) -> dict[str, Any]:
        """What it tells next. Raises TransferFailed where it has failed, or ended."""
        line = await cast(asyncio.StreamReader, self.process.stdout).readline()
        if not line:
            raise TransferFailed("the process that passes weights on has ended", is_own=True)
        news: dict[str, Any] = json.loads(line)
        if "failure" in news:
            raise TransferFailed(news["failure"], news["is_own"])
        return news

    async def is_free(self) -> bool:
        """Have it let its peers go; whether it can be told of another meeting then."""
        self._say(END)
        try:
            async with asyncio.timeout(FREE):
                while "is_free" not in await self.news():
                    pass  # what nobody has waited for
        except (TimeoutError, TransferFailed):
            return False
        return True

    async def end(self) -> None:
        """End it, whatever it is at."""
        with suppress(ProcessLookupError):  # it has ended
            self.process.kill()
        await self.process.wait()

    def _say(self, line: str) -> None:
        cast(asyncio.StreamWriter, self.process.stdin).write(f"{line}\n".encode())


class Transfers:
    """The processes that send or receive for this one: each is kept for the next meeting while all goes well.

    arguments: see `broadcast.main`.
    """

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self.idle: list[TransferProcess] = []

    @asynccontextmanager
    async def process(self) -> AsyncIterator[TransferProcess]:
        """A process for one meeting. What it is still at when the block ends is given up."""
        self.idle = [transfer for transfer in self.idle if transfer.is_alive]
        transfer = self.idle.pop() if self.idle else await start_transfer(*self.arguments)
        is_free = False
        try:
            yield transfer
            is_free = await transfer.is_free()
        finally:
            if is_free:
                self.idle.append(transfer)
            else:
                await transfer.end()

    async def close(self) -> None:
        """End those that are idle."""
        for transfer in self.idle:
            await transfer.end()
        self.idle.clear()


async def start_transfer(*arguments: str) -> TransferProcess:
    """Start a process that ends with this one. In a session of its own, it does not see Ctrl-C."""
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    return TransferProcess(
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dirl_cli.rollout.broadcast", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment | QUIET,
            start_new_session=True,
        )
    )
