"""Servers that a run starts on its own machine: processes that end with it, even where it is killed.

Each has a directory with its configuration, in which it says where it listens once it has loaded the model, and a log
beside that. They are killed in the end, since a server has nothing to save.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from dirl_cli.errors import DirlError
from dirl_cli.rollout.server_client import CONNECT

ADDRESS = "address"  # the file that says where a server listens
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a process group
POLL = 0.1  # seconds between looks at servers that start
LAST_LINES = 5  # of a log, that tell why its server ended


@dataclass(frozen=True)
class ServerProcess:
    """A server of a run's own. directory: of its configuration."""

    directory: Path
    process: "subprocess.Popen[bytes]"

    @property
    def log(self) -> Path:
        return log_of(self.directory)

    def url(self) -> str | None:
        """Where it answers, or None where it does not yet. Raises DirlError where it never will."""
        if self.process.poll() is not None:
            raise DirlError(
                f"a server ended before it answered ({self.last_lines}): mend that and give the same command; all that"
                f" it said is in {self.log}"
            )
        try:
            url = (self.directory / ADDRESS).read_text()
            return url if httpx.get(f"{url}/health", timeout=CONNECT, trust_env=False).is_success else None
        except (FileNotFoundError, httpx.HTTPError):
            return None

    @property
    def last_lines(self) -> str:
        """What it said last, once it has ended."""
        if self.process.returncode < 0:
            return f"killed by {signal.Signals(-self.process.returncode).name}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " / ".join(lines[-LAST_LINES:]) or f"exit code {self.process.returncode}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def start_server(directory: Path, environment: Mapping[str, str]) -> ServerProcess:
    """Start the server whose configuration is in a directory. environment: see `server_environment`."""
    command = [sys.executable, "-m", "dirl_cli.cli.worker", "beside", str(os.getpid()), "serve", str(directory)]
    with log_of(directory).open("ab") as log:  # where an earlier start may have said why it ended
        # In a session of its own it does not see Ctrl-C, after which the run still finishes its step.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return ServerProcess(directory, process)


def log_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.log")


def server_environment(environment: Mapping[str, str], gpu: str | None) -> dict[str, str]:
    """What a server has of the run's environment, in which its key is too, and the GPU that it sees.

    gpu: as CUDA names it; None on a CPU.
    """
    own = {name: value for name, value in environment.items() if name not in LAUNCHED}
    own["PYTHONUNBUFFERED"] = "1"  # so that its log has all that it said, however it ends
    if gpu is not None:
        own[VISIBLE_GPUS] = gpu
    return own


def gpus_of_servers(trainers: int, servers: int, environment: Mapping[str, str]) -> list[str]:
    """The GPUs after those of the run's own processes, one a server, as CUDA names them.

    Raises DirlError where the machine has too few.
    """
    count = torch.cuda.device_count()
    if trainers + servers > count:
        raise DirlError(
            f"gpus={trainers} and rollout.servers={servers} want {trainers + servers} GPUs, and there are {count} here:"
            " give fewer of either"
        )
    visible = environment.get(VISIBLE_GPUS)
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return names[trainers : trainers + servers]


def wait_for_servers(servers: Sequence[ServerProcess], patience: float) -> list[str]:
    """Where the servers answer, once all of them do.

    Raises DirlError where one has ended, or does not answer within `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while None in (urls := [server.url() for server in servers]):
        if time.monotonic() > deadline:
            late = servers[urls.index(None)]
            raise DirlError(
                f"a server does not answer within {patience:g} s: see {late.log}, or raise rollout.patience if it only"
                " takes its time to load the model"
            )
        time.sleep(POLL)
    return [url for url in urls if url]
