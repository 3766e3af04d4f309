"""A reward that fails once, where a flag of that name lies in $FAULTS. Without torch, which takes seconds to import."""

import os
import signal
import time
from pathlib import Path


def due(fault: str) -> bool:
    """Whether to fail now; the flag is taken away."""
    try:
        Path(os.environ["FAULTS"], fault).unlink()
    except FileNotFoundError:
        return False
    return True


def reward(answer) -> float:
    if due("hang"):
        time.sleep(600)
    if due("exit"):
        os._exit(3)
    if due("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if due("raise"):
        raise RuntimeError("a fault")
    return -answer.tokens / answer.max_new_tokens
