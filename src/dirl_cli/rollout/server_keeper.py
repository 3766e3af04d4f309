"""Servers of a run's own that are started again where they end: at the same address, so that the run finds them again.

An answer is decided by its seed, so that whoever gives it gives the same one.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread

from dirl_cli.rollout.server_processes import ServerProcess, start_server

POLL = 0.2  # seconds between looks at them
MOST_STARTS = 4  # of each server: what ends again and again would do so the whole night


class ServerKeeper:
    """The servers that a run has started, which end with the block; `watch` them once all of them answer.

    environments: of each server, see `server_environment`. starts: of each so far.
    """

    def __init__(self) -> None:
        self.servers: list[ServerProcess] = []
        self.environments: list[Mapping[str, str]] = []
        self.starts: list[int] = []
        self.is_over = Event()
        self.thread = Thread(target=self._watch, name="server keeper", daemon=True)

    def __enter__(self) -> "ServerKeeper":
        return self

    def __exit__(self, *error: object) -> None:
        self.is_over.set()
        if self.thread.is_alive():
            self.thread.join()  # it may be about to start one
        for server in self.servers:
            server.end()

    def start(self, directory: Path, environment: Mapping[str, str]) -> None:
        """Start the server whose configuration is in a directory, where it finds the address of its earlier start."""
        self.servers.append(start_server(directory, environment))
        self.environments.append(environment)
        self.starts.append(1)

    def watch(self) -> None:
        """From now on start those again that end."""
        self.thread.start()

    def end(self) -> str | None:
        """Why no server will answer any more, as far as this process knows; None while one may."""
        if not self.servers:
            return None
        for server, starts in zip(self.servers, self.starts, strict=True):
            if starts < MOST_STARTS or server.process.poll() is None:
                return None
        return (
            f"all servers of the run have ended, after {MOST_STARTS} starts each: {self.servers[0].directory.parent}"
            " has their logs; mend what they say and give the same command, which goes on"
        )

    def _watch(self) -> None:
        while not self.is_over.wait(POLL):
            for number, server in enumerate(self.servers):
                if server.process.poll() is not None and self.starts[number] < MOST_STARTS:
                    self._start_again(number)

    def _start_again(self, number: int) -> None:
        server = self.servers[number]
        print(
            f"server {number} of the run has ended ({server.last_lines}) and is started again; its log is {server.log}",
            file=sys.stderr,
            flush=True,
        )
        self.servers[number] = start_server(server.directory, self.environments[number])
        self.starts[number] += 1
