"""A run that is stopped and goes on with another number of processes, launched another way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.trials import SFT, Child, config, save_random_model

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def losses(out: Path) -> list[float]:
    file = out / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [line["loss"] for line in lines if "loss" in line]


def test_stopped_and_continued_by_others(tmp_path, tell):
    """One process, then two, then two that share the model, then one: the run that one process went through."""
    words = [save_random_model(tmp_path, 1.0), "steps=200", "save_every=0", "eval_every=0"]
    through, out = tmp_path / "through", tmp_path / "run"
    assert Child("sft", config("sft", *words), through).end() == 0
    first = Child("sft", config("sft", *words), out).wait_for("step 3/")
    first.send(signal.SIGTERM)
    survived = first.end() == 0
    others = [word for word in SFT if word.partition("=")[0] not in ("steps", "save_every", "eval_every")]
    command = [Path(sys.executable).with_name("dirl"), "sft", *others, *words, f"out={out}", "gpus=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for launch in ("ddp", "fsdp2"):
        done = len(losses(out))
        process = subprocess.Popen([*command, f"launch={launch}"], env=environment, stderr=subprocess.PIPE, text=True)
        while len(losses(out)) < done + 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.terminate()
        told = process.communicate(timeout=120)[1]
        assert process.returncode == 0 and "dirl sft: stopped after step" in told, told
        survived += 1
    files = [file.name for file in max((out / "checkpoints").iterdir()).iterdir()]
    assert "model-00002-of-00002.safetensors" in files
    assert Child("sft", config("sft", *words), out).end() == 0
    assert losses(out)[:40] == pytest.approx(losses(through)[:40], rel=1e-3)  # rounding grows from step to step
    tell("SIGTERM, then another number of processes: 1, 2 (ddp), 2 (fsdp2), 1", 3, survived)
