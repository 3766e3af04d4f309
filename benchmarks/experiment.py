"""What the experiments share: `dirl` commands run two at a time, each continued where it was, and read back."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path("runs/experiments")
SEEDS = (0, 1, 2)
BIN = Path(sys.executable).parent / "dirl"


def dirl(*words: object, threads: int = 1) -> None:
    """Run one command, quietly; its output is shown only if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([BIN, *map(str, words)], env=environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"dirl {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    print("done: dirl", *words, file=sys.stderr, flush=True)


def at_once(commands: Iterable[Sequence[object]], jobs: int = 2) -> None:
    """Run commands that do not depend on each other."""
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda words: dirl(*words), commands):
            pass


def fine_tuned(seed: int, *words: str, name: str = "sft") -> tuple[Path, list[object]]:
    """Where a fine-tuning run leaves its model, and its command."""
    out = ROOT / f"{name}-{seed}"
    return out / "model", ["sft", f"seed={seed}", f"out={out}", *words]


def evaluated(model: Path, *words: str) -> tuple[Path, list[object]]:
    """Where the evaluation of a model lies, and its command."""
    out = ROOT / "eval" / "-".join(model.parts[2:-1])
    return out / "eval_card.json", ["eval", f"model={model}", f"out={out}", *words]


def card(model: Path) -> dict[str, Any]:
    return json.loads(evaluated(model)[0].read_text())


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def late(run: Path, name: str, steps: int = 15) -> float:
    """A metric's mean over the last steps of a run."""
    return statistics.mean([line[name] for line in history(run) if name in line][-steps:])


def early(run: Path, name: str, steps: int = 15) -> float:
    """A metric's mean over the first steps of a run."""
    return statistics.mean([line[name] for line in history(run) if name in line][:steps])


def percent(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds, in percent."""
    return mean_and_error([100 * value for value in values], 1)


def mean_and_error(values: Sequence[float], digits: int) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"
