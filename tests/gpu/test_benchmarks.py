"""The benchmarks for a GPU and the script that runs them all, on a CPU and small models, to prove their logic."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.machine import differing
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


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> str:
    """A folder with the wheel of this checkout, as a machine without a network is given it."""
    folder = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    subprocess.run(build, cwd=ROOT, check=True)
    return str(folder)


def check(wheels: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = ["bash", str(ROOT / "scripts/gpu_check.sh"), wheels, str(out)]
    environment = os.environ | {"SHAPE": "toy", "PYTHON": sys.executable, "PYTHONPATH": ""} | environment
    return subprocess.run(script, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the real ones run")
@pytest.mark.timeout(600)
def test_the_check_for_a_gpu_runs_on_a_cpu_with_all_its_tables(wheels, tmp_path):
    parts = "machine tests samplers training rl-native kernels push"
    done = check(wheels, tmp_path, PARTS=parts)
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    for part in parts.split():
        assert f"| {part} | ok |" in report
        assert f"## {part}" in done.stdout  # at once, not only at the end
    for name in (
        "native, torch.float32 | 0 |",
        "DiPO ragged, packed",
        "| recorded trace | 4 |",
        "| rollout | ",
        "busy",
    ):
        assert name in report
    for line in report.splitlines():  # no file of tests fails to be collected
        assert not line.startswith("tests/") or "skipped" in line, line


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_fails_with_a_part_that_fails_and_goes_on_with_it(wheels, tmp_path):
    done = check(wheels, tmp_path, SHAPE="nothing", PARTS="machine push")
    assert done.returncode == 1
    assert "KeyError: 'nothing'" in done.stdout
    assert "| push | failed with 1 |" in done.stdout
    assert f'to go on: SHAPE=nothing PARTS="push" scripts/gpu_check.sh "{wheels}" "{tmp_path}"' in done.stdout
    again = check(wheels, tmp_path, PARTS="machine push")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "## machine" not in again.stdout.split("## push")[0], "what ended well is not repeated"
    assert "to go on" not in again.stdout


def test_a_package_that_is_not_this_checkouts_is_found(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory, text in ((ours, "a = 1"), (theirs, "a = 1")):
        directory.mkdir()
        (directory / "same.py").write_text(text)
    assert not differing(ours, theirs)
    (ours / "same.py").write_text("a = 2")
    (theirs / "gone.py").write_text("")
    assert differing(ours, theirs) == {Path("same.py"), Path("gone.py")}
