"""Whole steps of `dirl rl`, phase by phase, as the command itself logs them, on a model of random weights.

python -m benchmarks.gpu.rl_step [toy|1.7B] [native|lmdeploy] [tokenizer directory]
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import DEVICE, machine, random_model, row, saved, table

STEPS = 4 if DEVICE == "cuda" else 2  # the first of which compiles and captures
PROBLEMS, GROUP, NEW = (16, 8, 256) if DEVICE == "cuda" else (2, 2, 8)


def main(shape: str = "1.7B", engine: str = "native", tokenizer: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = saved(random_model(shape, "sdpa"), Path(directory) / "model", tokenizer)
        steps = run(model, engine, Path(directory) / "run")[1:]
    print(
        f"{machine()}. {shape}, rollout={engine}, weights in fp32 under bf16, {PROBLEMS * GROUP} answers of {NEW}"
        f" tokens, one update with gradient checkpointing; median of {len(steps)} steps after the first"
    )
    table("phase", "seconds", "of the step")
    phases = [name for name in steps[-1] if name.startswith("seconds/")]
    medians = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in phases}
    for name, seconds in medians.items():
        row(name.removeprefix("seconds/"), f"{seconds:.2f}", f"{100 * seconds / sum(medians.values()):.0f} %")
    rates = [PROBLEMS * GROUP * NEW / step["seconds/rollout"] for step in steps]
    row("answer tokens/s of the rollout", f"{statistics.median(rates):,.0f}", "")
    row("mismatch of sampler and trainer, mean", f"{steps[-1]['mismatch_mean']:.4f}", "")


def run(model: str, engine: str, out: Path) -> list[dict[str, Any]]:
    """What the command logs of its first steps. It is killed then, since it would save what nobody wants."""
    words = [
        f"model={model}",
        f"rollout={engine}",
        f"rollout.max_batch={PROBLEMS * GROUP}",
        f"out={out}",
        "steps=1000",
        f"rl.problems={PROBLEMS}",
        f"rl.group_size={GROUP}",
        "rl.mini_batches=1",
        "rl.filter=none",
        f"decoding.max_new_tokens={NEW}",
        "optim=adamw_rl",
        "optim.lr=1e-6",
        "row_tokens=8192",
        "micro_rows=1",
        "gradient_checkpointing=true",
        "eval_problems=0",
        "show_every=0",
        "save_every=0",
        "data.train=64",
    ]
    command = [sys.executable, "-c", "from dirl_cli.cli.app import app; app()", "rl", *words]
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        while len(steps := logged(out / "metrics.jsonl")) < STEPS:
            if process.poll() is not None:
                raise SystemExit(f"dirl rl ended with {process.returncode}")
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):  # it has ended, and all it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return steps


def logged(file: Path) -> list[dict[str, Any]]:
    """The steps in a log, without a line that is being written."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [step for step in map(json.loads, lines) if "seconds/rollout" in step]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut off"))  # so that what was started is ended too
    main(*sys.argv[1:])
