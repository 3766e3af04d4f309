"""Listen at a port until a signal or the engine's end: what is under way is finished first."""

import asyncio
import math
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from dirl_cli.errors import DirlError
from dirl_cli.serving.service import Service

LINGER = 5  # seconds beyond the grace, in which what was given back is sent
KEEP_ALIVE = 30  # seconds that an idle connection stays


class StoppingServer(uvicorn.Server):
    """uvicorn's, which tells `service` as soon as it is asked to stop."""

    def __init__(self, app: Starlette, service: Service) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(service.limits.grace) + LINGER,
            limit_concurrency=2 * service.capacity + 64,  # connections; whoever is one too many gets a plain 503
        )
        super().__init__(config)
        self.service = service
        self.running_loop: asyncio.AbstractEventLoop | None = None
        service.engine.ended.add_done_callback(lambda _: self.ask_to_stop())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.running_loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.ask_to_stop()

    def ask_to_stop(self) -> None:
        """Stop once what is under way is over, from any thread."""
        self.should_exit = True
        if self.running_loop and not self.running_loop.is_closed():
            self.running_loop.call_soon_threadsafe(self.service.begin_stop)


def listener_at(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes a free one. Raises DirlError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise DirlError(
            f"serve.host={host} serve.port={port} cannot be listened at ({error}): give another, or serve.port=0 for a"
            " free one"
        ) from error


def address_of(listener: socket.socket) -> str:
    """The address that a client asks."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
