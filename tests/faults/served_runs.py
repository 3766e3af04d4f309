"""Runs that sample with servers, and two servers that faults befall."""

import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from dirl_cli.rollout import server_client
from tests.faults.trials import Child, config, result, without_pictures


class Servers:
    """Two servers that can be killed, stopped and started again at the same addresses.

    received: where they put weights that they are sent.
    """

    def __init__(self, word: str, directory: Path) -> None:
        self.word = word
        self.directory = directory
        self.received = directory / "received"
        self.received.mkdir()
        self.ports = [free_port() for _ in range(2)]
        self.children: list[Child] = []
        self.starts = 0
        for number in range(2):
            self.children.append(self._started(number))
        self.wait()

    @property
    def url(self) -> str:
        return f"rollout.url=[{','.join(f'http://127.0.0.1:{port}' for port in self.ports)}]"

    def _started(self, number: int) -> Child:
        self.starts += 1
        cfg = config("serve", self.word, f"serve.port={self.ports[number]}")
        return Child("serve", cfg, self.directory / f"server-{self.starts}", self._receive_here)

    def _receive_here(self) -> None:
        tempfile.tempdir = str(self.received)

    def wait(self) -> None:
        for child in self.children:
            child.wait_for(" answers at once")

    def kill(self, number: int) -> None:
        assert self.children[number].kill()

    def start(self, number: int) -> None:
        self.children[number] = self._started(number)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def served_config(word: str, url: str, out: Path, *words: str):
    own = ("rollout=server", url, "rollout.max_batch=1", f"rollout.directory={out}/weights", "rollout.silence=2")
    return config("rl", word, *own, *words)


def impatient() -> None:
    server_client.CONNECT = 2
    sys.stderr = sys.stdout  # where it says which servers are left out
    without_pictures()


@contextmanager
def run_of(cfg, out: Path, survives: list[int], expected: dict, before: Callable[[], None] = impatient):
    """A run under way at its third step, which is to end with the expected bytes. before: called in it first."""
    child = Child("rl", cfg, out, before).wait_for("step 2/")
    yield child
    code = child.end()
    assert code == 0 and "is left out until it is back" in child.told, child.told
    survives.append(int(result(out) == expected))


def own_words(out: Path) -> tuple[str, ...]:
    return ("rollout=server", "rollout.servers=2", "rollout.max_batch=1", f"rollout.directory={out}/weights")
