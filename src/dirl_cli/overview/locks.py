"""Who holds the lock of a run directory, which is held as long as the run lives."""

import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Liveness = Literal["alive", "suspended", "dead"]
HELD_LOCK = re.compile(r"FLOCK\s+ADVISORY\s+\w+\s+(-?\d+)\s+[0-9a-f]+:[0-9a-f]+:(\d+)\s")  # of /proc/locks: pid, inode


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    pid: of the process that took it; None where that is not known here, as on another machine or in a container.
    heirs: where that is dead, the processes that it left behind with the lock still open.
    """

    pid: int | None
    liveness: Liveness
    heirs: tuple[int, ...] = ()


def lock_holder(lock: Path) -> Holder | None:
    """Who holds a lock file; None where nobody does, where there is none, and where it may not be read."""
    try:
        with lock.open() as file:
            # Shared and for no longer than this line: a run that starts in that very moment tries again.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        pass
    except OSError:
        return None

    pid = taker(lock)
    if pid is None:
        return Holder(None, "alive")
    liveness = liveness_of(pid)
    heirs = tuple(processes_with(lock)) if liveness == "dead" else ()
    return Holder(pid, liveness, heirs)


def taker(lock: Path) -> int | None:
    """The process that took a lock which is held, as Linux lists it."""
    try:
        inode = lock.stat().st_ino
        held = Path("/proc/locks").read_text()
    except OSError:
        return None
    for pid, locked_inode in HELD_LOCK.findall(held):
        if int(locked_inode) == inode and int(pid) > 0:
            return int(pid)
    return None


def liveness_of(pid: int) -> Liveness:
    """Whether a process of this machine goes on; one that Ctrl-Z suspended does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "dead"
    state = stat.rpartition(")")[2].split()[0]  # after its name, which may hold anything
    if state in "ZX":
        return "dead"
    return "suspended" if state in "Tt" else "alive"


def processes_with(file: Path) -> Iterator[int]:
    """The processes of this machine that have a file open, as far as they may be looked into."""
    target = os.path.realpath(file)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:  # another user's, or gone meanwhile
            continue
        if target in opened:
            yield int(process.name)
