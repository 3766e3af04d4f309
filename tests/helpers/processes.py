"""Processes of this machine that find each other as those of `torchrun` do."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from tests.helpers.paths import ROOT


def run_together(module: str, words: Sequence[Sequence[str]], seconds: float, **variables: str) -> list[str]:
    """Run `python -m module` in a process for each list of words, the first of them rank 0; returns what each prints.

    seconds: that each has. variables: of the environment, besides those by which the processes meet.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(len(words)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *own],
            cwd=ROOT,
            env={**os.environ, **world, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(words)
    ]
    try:
        printed = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(words), printed
    return printed
