"""A server of a pool: how it is asked, what is known of it, and what kept several from something."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dirl_cli.errors import DirlError
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.server_client import ServerFailed, Source


class Client(Protocol):
    """A server of any kind, as it is asked: see `ServerClient`, of `dirl serve`.

    length_option: what it is started with for more room.
    """

    url: str
    length_option: str

    async def room(self) -> int:
        """See `ServerClient.room`."""
        ...

    async def lacks(self, weights: WeightsId) -> bool:
        """See `ServerClient.lacks`."""
        ...

    async def take(self, source: Source, weights: WeightsId, until: float) -> None:
        """See `ServerClient.take`."""
        ...

    def choices(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """See `ServerClient.choices`."""
        ...


@dataclass(eq=False)
class PooledServer:
    """A server, and what is known of it.

    tokens, answers: that it still owes, at most. length: of a prompt and its answer, for which it has room; 0 where it
    has not said. failures: in a row. is_up: whether it may be asked. failure: why it may not. rests_until: when it is
    to be asked again how it is, by `time.monotonic`. is_alone: whether weights are sent to it apart from the others.
    """

    client: Client
    tokens: int = 0
    answers: int = 0
    length: int = 0
    failures: int = 0
    is_up: bool = False
    failure: str = "was not asked yet"
    rests_until: float = 0.0
    is_alone: bool = False


Outcomes = dict[PooledServer, ServerFailed | DirlError | None]  # what kept each server from something


async def outcomes_of(works: Mapping[PooledServer, Awaitable[None]]) -> Outcomes:
    """What came of each server's work, once all of it is over."""
    outcomes: Outcomes = {}
    results = await asyncio.gather(*works.values(), return_exceptions=True)
    for server, result in zip(works, results, strict=True):
        if result is None or isinstance(result, ServerFailed | DirlError):
            outcomes[server] = result
        elif isinstance(result, LookupError | TypeError | ValueError):
            outcomes[server] = ServerFailed("is no such server, or of another version")
        else:
            raise result
    return outcomes


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Give tasks up, and wait until they are; what they raise is taken, since asyncio prints what nobody takes."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
