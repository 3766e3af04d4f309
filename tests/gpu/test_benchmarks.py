"""The benchmarks for a GPU and the script that runs them all, on a CPU and small models, to prove their logic."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu.replay import MEAN_STEPS, PATTERNS
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding
from tests.helpers.paths import ROOT
from tests.helpers.small import small_lm


def test_a_recorded_trace_is_replayed_whatever_the_tokens():
    decoding = Decoding(strategy="benchmarks.gpu.replay.replayed", max_new_tokens=40)
    [[one], [other]] = NativeSampler(small_lm()).sample([[2, 3, 4, 5], [6] * 8], 1, decoding)
    steps = [step for pattern in 3 * PATTERNS for step in pattern]
    assert one.reveal_step == steps[4:44]  # behind a prompt of one block
    assert other.reveal_step == steps[8:48]
    assert one.forwards / 10 == MEAN_STEPS


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the real ones run")
@pytest.mark.timeout(600)
def test_the_check_for_a_gpu_runs_on_a_cpu_with_all_its_tables(tmp_path):
    parts = "machine push training samplers rl-native"
    environment = os.environ | {"SHAPE": "toy", "PARTS": parts, "PYTHON": sys.executable}
    script = ["bash", str(ROOT / "scripts/gpu_check.sh"), "", str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    for part in parts.split():
        assert f"| {part} | ok |" in report
    for name in ("native, torch.float32 | 0 |", "DiPO ragged, packed", "| recorded trace | 4 |", "| rollout | "):
        assert name in report


@pytest.mark.slow
def test_it_fails_with_a_part_that_fails(tmp_path):
    environment = os.environ | {"SHAPE": "nothing", "PARTS": "push", "PYTHON": sys.executable}
    script = ["bash", str(ROOT / "scripts/gpu_check.sh"), "", str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "KeyError: 'nothing'" in done.stdout
    assert "| push | failed with 1 |" in done.stdout
