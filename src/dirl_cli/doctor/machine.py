"""Look at this machine: processors, memory, disks, GPUs and the Hub. Nothing here judges what it sees."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import httpx
import psutil
from huggingface_hub import constants, get_token

NVIDIA = "0x10de"
DISPLAY = "0x03"  # how the class of a GPU begins on the PCI bus
PATIENCE = 20.0  # seconds for nvidia-smi, which takes some where the driver sleeps
QUERY = "name,memory.total,memory.free,driver_version"


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver lists it, in megabytes."""

    name: str
    total_mb: int
    free_mb: int


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver. error: what nvidia-smi says where it does not work."""

    version: str
    gpus: tuple[Gpu, ...]
    error: str = ""


@dataclass(frozen=True)
class Disk:
    """The file system that a path is or will be on; bytes. inodes: files that still fit; 0 means none does."""

    path: Path
    free: int
    total: int
    inodes: int
    is_writable: bool


@dataclass(frozen=True)
class HubAnswer:
    """Whether the Hub answered. problem: "" where it did. is_switched_off: whether it was not to be asked."""

    endpoint: str
    problem: str
    is_switched_off: bool
    has_token: bool


def gpus_on_bus(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """How many NVIDIA GPUs Linux sees, with a driver or without."""
    count = 0
    for device in devices.glob("*"):
        try:
            vendor = (device / "vendor").read_text().strip()
            kind = (device / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == NVIDIA and kind.startswith(DISPLAY)
    return count


def read_driver() -> Driver | None:
    """What nvidia-smi tells; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Driver("", (), f"nvidia-smi does not answer within {PATIENCE:.0f} s")
    if answer.returncode != 0:
        return Driver("", (), " ".join((answer.stdout + answer.stderr).split()))
    return parse_driver(answer.stdout)


def parse_driver(text: str) -> Driver:
    """What nvidia-smi writes: name, memory, free memory and version, a line a GPU."""
    gpus = []
    version = ""
    for line in text.splitlines():
        name, total, free, version = (part.strip() for part in line.rsplit(",", 3))
        gpus.append(Gpu(name, megabytes(total), megabytes(free)))
    return Driver(version, tuple(gpus))


def megabytes(text: str) -> int:
    """A number of nvidia-smi; 0 where it has none, as for GPUs that share the memory of the machine."""
    return int(text) if text.isdigit() else 0


def core_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """The cores' worth of time that a container is given; None where that is not limited."""
    try:
        quota, period = file.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory() -> tuple[int, int]:
    """The bytes of memory that are available, and all of them; a container's limit counts."""
    seen = psutil.virtual_memory()
    limit, used = (read_bytes(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current"))
    if limit is None or used is None or limit >= seen.total:
        return seen.available, seen.total
    return min(seen.available, limit - used), limit


def read_bytes(file: Path) -> int | None:
    """The number in a file of a cgroup; None where it has none, such as `max`."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def disk_of(path: Path) -> Disk:
    """The file system of a path; one that does not exist will be made in the nearest directory that does."""
    existing = path.expanduser().absolute()
    while not os.path.exists(existing):  # unlike Path's it is False, too, for one that may not be looked at
        existing = existing.parent
    stat = os.statvfs(existing)
    return Disk(
        path,
        free=stat.f_bavail * stat.f_frsize,
        total=stat.f_blocks * stat.f_frsize,
        inodes=stat.f_favail if stat.f_files else 1,  # some file systems count none
        is_writable=os.access(existing, os.W_OK | os.X_OK),
    )


def cached_repositories() -> dict[str, int]:
    """How many models and data sets are in the Hub's cache, whole or in part."""
    cache = Path(constants.HF_HUB_CACHE)
    return {kind: len(list(cache.glob(f"{kind}s--*"))) for kind in ("model", "dataset")}


def asking_hub(seconds: float) -> Callable[[], HubAnswer]:
    """Ask the Hub for a sign of life while other things go on; what is returned waits for it.

    seconds: to wait. Looking up a name knows no time limit: a thread does it, which may be left behind.
    """
    is_switched_off = constants.HF_HUB_OFFLINE
    problems: list[str] = []
    thread = Thread(target=lambda: problems.append(hub_problem(seconds)), daemon=True)
    if not is_switched_off:
        thread.start()

    def answer() -> HubAnswer:
        if not is_switched_off:
            thread.join(seconds)
        problem = problems[0] if problems else f"no answer within {seconds:.0f} s"
        return HubAnswer(constants.ENDPOINT, problem, is_switched_off, has_token=get_token() is not None)

    return answer


def hub_problem(seconds: float) -> str:
    """Why the Hub cannot be asked; "" where it can."""
    try:
        response = httpx.head(constants.ENDPOINT, timeout=seconds)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return f"it answers with {response.status_code}" if response.status_code >= 400 else ""
