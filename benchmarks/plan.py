"""Memory as planned against memory as measured, for models of three sizes on a CPU.

python -m benchmarks.plan            # about half an hour on one busy core, at most 4 GB
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.measured import Live, Size, Trial

SIZES = {
    "10 M": Size(hidden=256, layers=6, heads=4, key_heads=2, inner=768, vocabulary=10_000),
    "40 M": Size(hidden=512, layers=8, heads=8, key_heads=4, inner=1536, vocabulary=16_000),
    "120 M": Size(hidden=768, layers=12, heads=12, key_heads=4, inner=2048, vocabulary=32_000),
}
TRIALS = {
    "fine_tune": {"tokens": 500, "row_tokens": 1024},
    "reinforce": {"tokens": 190, "row_tokens": 1024, "prompt": 61},
    "sample": {"tokens": 32, "prompt": 301},
}
WAYS = {"fp32": ("float32", False), "fp32, checkpointing": ("float32", True), "bf16": ("bfloat16", False)}
MIB = 1024**2


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measure(size: str, work: str, way: str) -> None:
    """Print bytes as planned, as counted storage by storage, and as this process grew, which does nothing else."""
    dtype, checkpointing = WAYS[way]
    trial = Trial(SIZES[size], dtype, checkpointing=checkpointing, **TRIALS[work])
    small = Trial(Size(64, 1, 2, 1, 64, 100, head_dim=32), dtype, checkpointing=checkpointing, tokens=16)
    getattr(small, work)(small.size.build())  # libraries set themselves up at their first use
    before = memory("VmRSS")
    with Live() as live:
        lm = trial.size.build()
        live.peak = live.now
        Path("/proc/self/clear_refs").write_text("5")  # start VmHWM anew
        planned = getattr(trial, work)(lm).need({})
    print(planned, live.peak, memory("VmHWM") - before)


def main() -> None:
    # memory that is freed goes back at once, so that what the process holds is what it uses
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}. MiB at the peak.\n")
    print("| parameters | work | | planned | tensors | process | planned ÷ tensors | ÷ process |")
    print("|--:|---|---|--:|--:|--:|--:|--:|")
    for size in SIZES:
        for work in TRIALS:
            for way in WAYS:
                if work == "sample" and WAYS[way][1]:
                    continue  # sampling keeps nothing for backpropagation
                command = [sys.executable, "-m", "benchmarks.plan", size, work, way]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                planned, tensors, process = map(int, done.stdout.split())
                cells = [f"{count / MIB:,.0f}" for count in (planned, tensors, process)]
                ratios = f"{planned / tensors:.2f} | {planned / process:.2f}"
                print(f"| {size} | {work} | {way} | {' | '.join(cells)} | {ratios} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main()
