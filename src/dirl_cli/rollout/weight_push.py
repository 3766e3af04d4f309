"""How weights get from the first process of a run to servers: over a disk that all see, or sent to all at once."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from dirl_cli.distributed import is_first_of_group
from dirl_cli.errors import DirlError
from dirl_cli.models.safe_files import WEIGHTS
from dirl_cli.rollout.meeting import Meeting, address_towards
from dirl_cli.rollout.pooled_server import Outcomes, PooledServer, cancelled, outcomes_of
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.server_client import BrokenOff, ServerFailed, Source
from dirl_cli.rollout.transfers import TransferFailed, Transfers

PART = 64 * 2**20  # bytes that are sent at once
STEP = 30.0  # seconds in which so many have to arrive, at most
LATE = ServerFailed("does not tell whether it has taken new weights")
JOIN_SHARE, STEP_SHARE = 1 / 4, 1 / 8  # of rollout.push_timeout, so that there is time for a second try


class WeightPush(Protocol):
    """A way for weights to get to servers.

    grace: seconds that servers have to tell how they fared once the first has failed; None for all that they are given.
    """

    @property
    def grace(self) -> float | None: ...

    def offered(self, path: Path, servers: int) -> AbstractAsyncContextManager[list[Source]]:
        """Offer the weights in a directory to so many servers for as long as the block lasts: what each is told.

        Raises ServerFailed where this process cannot, and DirlError where none can.
        """
        ...


class DiskPush:
    """Servers read the file themselves, under the path that it has here. What befalls one is nothing to the others."""

    grace = None

    @asynccontextmanager
    async def offered(self, path: Path, servers: int) -> AsyncIterator[list[Source]]:
        """See `WeightPush.offered`."""
        yield [{"path": str(path)}] * servers


class BroadcastPush:
    """The first process sends the file's bytes to all servers at once, which pass them on to each other.

    host: the address of this machine at which the servers meet. timeout: seconds that all of it may take.
    """

    def __init__(self, host: str, timeout: float) -> None:
        self.host = host
        self.timeout = timeout
        self.step = min(STEP, STEP_SHARE * timeout)
        self.grace = 2 * self.step
        self.transfers = Transfers()

    @asynccontextmanager
    async def offered(self, path: Path, servers: int) -> AsyncIterator[list[Source]]:
        """See `WeightPush.offered`. The block's end gives up what is not sent by then."""
        if not is_first_of_group():
            raise ServerFailed("has other weights until the run's first process has sent it these")
        file = path / WEIGHTS
        try:
            size = file.stat().st_size
        except OSError as error:
            raise ServerFailed(f"cannot be sent {file} ({error.strerror})") from error

        meeting = Meeting(self.host, 0, 0, servers + 1, size, PART, JOIN_SHARE * self.timeout, self.step)
        async with self.transfers.process() as transfer:
            transfer.begin(file, meeting)
            try:
                news = await transfer.news()
            except TransferFailed as failure:
                raise DirlError(
                    f"weights cannot be sent ({failure}): give rollout.push_host an address of this machine that"
                    " servers reach"
                ) from failure
            ranks = range(1, servers + 1)
            yield [{"broadcast": asdict(replace(meeting, port=news["port"], rank=rank))} for rank in ranks]


@dataclass(frozen=True)
class Delivery:
    """Weights in a directory on their way to servers. timeout: seconds that all of it may take."""

    push: WeightPush
    path: Path
    weights: WeightsId
    timeout: float

    async def to(self, servers: Sequence[PooledServer]) -> Outcomes:
        """Give servers the weights, all at the same time; what kept each from taking them."""
        until = asyncio.get_running_loop().time() + self.timeout
        together = [server for server in servers if not server.is_alone]
        groups = [together, *([server] for server in servers if server.is_alone)]
        outcomes: Outcomes = {}
        for part in await asyncio.gather(*(self._to_group(group, until) for group in groups)):
            outcomes |= part
        return outcomes

    async def _to_group(self, servers: Sequence[PooledServer], until: float) -> Outcomes:
        """Give servers the weights together, and once more where some broke the others' off.

        Those for whom they break off again are sent theirs alone from now on: who is to blame is not known, and a
        network may keep servers from each other for good.
        """
        outcomes = await self._try(servers, until)
        broken_off = [server for server in servers if isinstance(outcomes[server], BrokenOff)]
        if not broken_off:
            return outcomes
        again = await self._try(broken_off, until)
        for server, failure in again.items():
            if isinstance(failure, BrokenOff) and len(again) > 1:
                server.is_alone = True
        return outcomes | again

    async def _try(self, servers: Sequence[PooledServer], until: float) -> Outcomes:
        """Give servers the weights together. Once one has failed the others do not wait for it."""
        if not servers:
            return {}
        works: dict[PooledServer, asyncio.Task[None]] = {}
        try:
            async with self.push.offered(self.path, len(servers)) as sources:
                for server, source in zip(servers, sources, strict=True):
                    works[server] = asyncio.create_task(server.client.take(source, self.weights, until))
                await asyncio.wait(works.values(), return_when=asyncio.FIRST_EXCEPTION)
            _, late = await asyncio.wait(works.values(), timeout=self.push.grace)
            outcomes = await outcomes_of({server: work for server, work in works.items() if work not in late})
            return dict.fromkeys(works, LATE) | outcomes
        except (ServerFailed, DirlError) as failure:
            return dict.fromkeys(servers, failure)
        finally:
            await cancelled(works.values())


def meeting_host(urls: Sequence[str]) -> str:
    """The address of this machine by which servers reach it: 127.0.0.1 where all of them are on it.

    Raises DirlError where one of them has no address.
    """
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        try:
            addresses.append(address_towards(parts.hostname or "", parts.port or 80))
        except OSError as error:
            raise DirlError(
                f"{url} has no address ({error.strerror}): mend rollout.url, or give rollout.push_host the address of"
                " this machine that servers reach"
            ) from error
    return next((address for address in addresses if not ip_address(address).is_loopback), addresses[0])
