"""The servers that are sampled with: which of them may be asked, and what becomes of those that fail.

A server that fails is left out, and asked ever more rarely how it is, until it has the weights that count. All of this
runs in one event loop.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dirl_cli.distributed import is_first_of_group
from dirl_cli.errors import DirlError
from dirl_cli.rollout.pooled_server import Client, Outcomes, PooledServer, cancelled, outcomes_of
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.server_client import Patience, ServerFailed
from dirl_cli.rollout.weight_push import Delivery, WeightPush

POLL = 0.05  # seconds between looks at who has room
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before a server that failed is asked again
End = Callable[[], str | None]  # why no server will ever answer again


def unknown_end() -> None:
    """Nobody knows of servers that somebody else has started whether they come back."""


class ServerPool:
    """Servers, and the weights that count. max_batch: answers that are asked of each at once. push: how they get
    weights. end: tells at once what else is found out by waiting, where it is known.

    weights: None while nothing is to be asked. path: where they lie. last_heard: when any server last did something,
    by `time.monotonic`.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        max_batch: int,
        patience: Patience,
        push: WeightPush,
        end: End = unknown_end,
    ) -> None:
        self.servers = [PooledServer(client) for client in clients]
        self.max_batch = max_batch
        self.patience = patience
        self.push = push
        self.end = end
        self.weights: WeightsId | None = None
        self.path = Path()
        self.last_heard = 0.0
        self.returning: set[asyncio.Task[None]] = set()  # what brings servers back

    def heard(self) -> None:
        """Some server has done something just now."""
        self.last_heard = time.monotonic()

    def least_busy(self, answers: int) -> PooledServer | None:
        """The server with the fewest tokens outstanding, among those that have room for so many answers."""
        able = []
        for server in self.servers:
            if server.is_up and (not server.answers or server.answers + answers <= self.max_batch):
                able.append(server)
        return min(able, key=lambda server: server.tokens, default=None)

    def leave_out(self, server: PooledServer, failure: ServerFailed | DirlError) -> None:
        """Ask a server nothing until it has the weights that count; from now on that is looked after."""
        server.is_up = False
        server.length = 0  # what comes back may be started otherwise
        server.failure = str(failure)
        server.failures += 1
        if is_first_of_group():
            print(f"{server.client.url} is left out until it is back: {failure}", file=sys.stderr, flush=True)
        self._let_rest(server, failure)
        self._look_after(server)

    def pause(self, server: PooledServer, failure: ServerFailed) -> None:
        """Ask a server nothing for a while that has too much to do, which is no fault of its own."""
        server.is_up = False
        self._let_rest(server, failure)
        self._look_after(server)

    def _let_rest(self, server: PooledServer, failure: ServerFailed | DirlError) -> None:
        """Ask a server nothing for as long as it says, and the longer the more often it has failed."""
        doublings = min(max(server.failures - 1, 0), 16)
        pause = min(FIRST_PAUSE * 2**doublings, LONGEST_PAUSE)
        if isinstance(failure, ServerFailed):
            pause = max(pause, failure.pause)
        server.rests_until = time.monotonic() + pause

    def _look_after(self, server: PooledServer) -> None:
        task = asyncio.create_task(self._bring_back(server))
        self.returning.add(task)
        task.add_done_callback(self.returning.discard)

    async def _bring_back(self, server: PooledServer) -> None:
        """Look after a server that was left out, ever more rarely, until it may be asked again.

        A rest that has begun goes on where new weights have come meanwhile: they may come more often than it ends.
        """
        while not server.is_up:
            await asyncio.sleep(max(server.rests_until - time.monotonic(), 0))
            failure = (await self._prepare([server]))[server]
            if failure:
                server.failure = str(failure)
                server.failures += 1
                self._let_rest(server, failure)

    async def _prepare(self, servers: Sequence[PooledServer]) -> Outcomes:
        """Let servers be asked, once they have the weights that count; what keeps each from that."""
        if self.weights is None:
            return dict.fromkeys(servers, ServerFailed("waits for weights"))
        delivery = Delivery(self.push, self.path, self.weights, self.patience.push)
        lacking = []

        async def look(server: PooledServer) -> None:
            if not server.length:
                server.length = await server.client.room()
            if await server.client.lacks(delivery.weights):
                lacking.append(server)

        outcomes = await outcomes_of({server: look(server) for server in servers})
        outcomes |= await delivery.to(lacking)
        for server, failure in outcomes.items():
            if not failure:
                server.is_up = True
                self.heard()
        return outcomes

    async def forget_weights(self) -> None:
        """Ask no server any more, and bring none any weights, until `adopt` says which."""
        self.weights = None
        await cancelled(self.returning)
        for server in self.servers:
            server.is_up = False

    async def adopt(self, path: Path, weights: WeightsId) -> None:
        """Ask for answers of these weights from now on, as soon as any server has them.

        Those that fail are left out; others are waited for. Raises DirlError where none is left.
        """
        self.path = path
        self.weights = weights
        self.heard()
        is_start = not any(server.length for server in self.servers)
        sound = [server for server in self.servers if not server.failures]
        for server in self.servers:
            if server.failures:  # it may hang, for which the others do not wait
                self._look_after(server)
        for server, failure in (await self._prepare(sound)).items():
            if isinstance(failure, DirlError) and is_start:
                raise failure  # a wrong key or model, which waiting does not mend
            if failure:
                self.leave_out(server, failure)

        if is_first_of_group() and not any(server.is_up for server in self.servers):
            print(f"no server answers: waiting for up to {self.patience.outage:g} s", file=sys.stderr, flush=True)
        while not any(server.is_up for server in self.servers):
            self.require_hope()
            await asyncio.sleep(POLL)

    def require_hope(self) -> None:
        """Raises DirlError where no server has answered for as long as the run may wait, or will any more."""
        if any(server.is_up for server in self.servers):
            return
        if reason := self.end():
            raise DirlError(reason)
        if time.monotonic() - self.last_heard > self.patience.outage:
            reasons = "; ".join(f"{server.client.url} {server.failure}" for server in self.servers)
            raise DirlError(
                f"no server has answered for {self.patience.outage:g} s ({reasons}): start them again and give the same"
                " command, which goes on"
            )
