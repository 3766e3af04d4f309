"""What a card says of the circumstances of a run, so that its figures can stand in a leaderboard and be repeated."""

import json
import platform
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from dirl_cli.distributed import cores
from dirl_cli.evaluation.result_card import read_card

ENVIRONMENT = "environment.json"  # of a run directory: command, versions, commit
CPU_NAME = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)


def run_record(out: Path, processes: int, did_work: bool) -> dict[str, Any]:
    """When and on what a run ended: `date` in UTC, `hardware`, and the `environment` of its directory.

    out: the run directory. processes: that share the work, each with its own GPU if there is one. did_work: whether
    this start had anything left to answer; otherwise an earlier one ended the run, and its record stays.
    """
    if not did_work and (earlier := read_card(out).get("record")):
        return dict(earlier)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {**hardware(), "processes": processes},
        "environment": environment_of(out),
    }


def environment_of(out: Path) -> Mapping[str, Any]:
    """What the run directory says of its last start; nothing where it was not opened as one."""
    file = out / ENVIRONMENT
    if not file.exists():
        return {}
    environment: Mapping[str, Any] = json.loads(file.read_text())
    return environment


def hardware() -> dict[str, Any]:
    """The machine: CPU, cores that may be used, memory in GB, and its GPUs where torch is imported and sees any."""
    described: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [],
    }
    torch: Any = sys.modules.get("torch")  # grading alone does not import it
    if torch and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory_gb = round(properties.total_memory / 1e9, 1)
            described["gpus"].append({"name": properties.name, "memory_gb": memory_gb})
    return described


def cpu_name() -> str:
    """What the CPU calls itself."""
    file = Path("/proc/cpuinfo")
    if file.exists() and (named := CPU_NAME.search(file.read_text())):
        return named[1]
    return platform.processor() or platform.machine()
