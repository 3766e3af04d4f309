"""Import packages in a process of its own, since a broken one may end the process or hang it.

Each that ends well has a line on standard output; the first that fails ends the process. `import_all` starts another
for those after it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

ENDS = "doctor ends "
PATIENCE = 180.0  # seconds for all of them: the first import of torch from a slow disk takes a minute


@dataclass(frozen=True)
class Imported:
    """What came of an import. error: why it failed, "" where it did not. facts: what the package says of itself."""

    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def import_all(names: Sequence[str], seconds: float = PATIENCE) -> dict[str, Imported]:
    """Import packages one after the other, by the names in EXAMINATIONS or as modules.

    Without torch none of the others is tried: all need it.
    """
    results: dict[str, Imported] = {}
    missing = list(names)
    while missing and not (results.get("torch") or Imported()).error:
        command = [sys.executable, "-P", "-m", "dirl_cli.doctor.imports", *missing]
        try:
            child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
            output, reason = child.stdout, reason_of(child.returncode, child.stderr)
        except subprocess.TimeoutExpired as expired:
            output = (expired.stdout or b"").decode(errors="replace")
            reason = f"it was not done after {seconds:.0f} s"

        ended = dict(read_ends(output))
        failed = [name for name in missing if name not in ended][:1]  # the first that did not end
        results |= ended | {name: Imported(reason) for name in failed}
        missing = [name for name in missing if name not in results]
    return results


def read_ends(output: str) -> list[tuple[str, Imported]]:
    """The packages whose import ended well, and what they say of themselves."""
    ended = []
    for line in output.splitlines():
        if line.startswith(ENDS):
            name, _, facts = line.removeprefix(ENDS).partition(" ")
            ended.append((name, Imported(facts=json.loads(facts))))
    return ended


def reason_of(code: int, stderr: str) -> str:
    """Why a process failed: the signal that ended it, or the last line that it wrote."""
    if code < 0:
        return f"{signal.Signals(-code).name} ended the process"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with exit code {code}"


def examine_torch() -> dict[str, Any]:
    torch = import_module("torch")
    return {"cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def examine_cuda() -> dict[str, Any]:
    """Start CUDA and compute something on its first device."""
    torch = import_module("torch")
    torch.cuda.init()
    (torch.ones(1, device="cuda") + 1).item()
    return {}


def examine_triton() -> dict[str, Any]:
    """Import Triton and let it compile what it talks to the driver with, for which it needs a C compiler."""
    triton = import_module("triton")
    triton.runtime.driver.active.get_current_target()
    return {}


EXAMINATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": examine_torch,
    "cuda": examine_cuda,
    "triton": examine_triton,
}
MODULES = {"lmdeploy": "dirl_cli.rollout.lmdeploy"}  # where they are not called the same


def main(names: Sequence[str]) -> None:
    # What packages print goes elsewhere: standard output is for our lines.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in names:
        facts: dict[str, Any] = {}
        if name in EXAMINATIONS:
            facts = EXAMINATIONS[name]()
        else:
            import_module(MODULES.get(name, name))
        print(f"{ENDS}{name} {json.dumps(facts)}", file=lines)


if __name__ == "__main__":
    main(sys.argv[1:])
