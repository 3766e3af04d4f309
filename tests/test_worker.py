"""Commands in several processes: all read one config, and a failure is one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Python imports this at every start; it puts a stand-in in the place of `dirl sft`.
STAND_IN = """
import signal, sys, time, types

def run(cfg, out):
    from accelerate import Accelerator
    from dirl_cli.errors import DirlError
    accelerator = Accelerator(cpu=True)
    (out / f"rank{accelerator.process_index}").write_text(f"{cfg.seed} of {accelerator.num_processes}")
    if cfg.steps == 13 and accelerator.process_index == 1:
        raise DirlError("13 brings bad luck: take another number")
    if cfg.steps == 14 and accelerator.process_index == 1:
        raise ZeroDivisionError("a bug")
    if cfg.steps == 15:
        stop = lambda *_: (out / f"stopped{accelerator.process_index}").touch() or sys.exit()
        signal.signal(signal.SIGTERM, stop)
        (out / f"ready{accelerator.process_index}").touch()
        time.sleep(60)
    accelerator.wait_for_everyone()

sys.modules["dirl_cli.commands.sft"] = types.SimpleNamespace(run=run)
"""


def start(directory, *words, **streams):
    (directory / "sitecustomize.py").write_text(STAND_IN)
    environment = {**os.environ, "PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"}
    command = [Path(sys.executable).with_name("dirl"), *words, "gpus=2", "device=cpu"]
    return subprocess.Popen(command, cwd=directory, env=environment, text=True, **streams)


def dirl(directory, *words):
    """The exit code and what was written to stderr."""
    process = start(directory, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, told = process.communicate()
    return process.returncode, told


def test_every_process_reads_the_same_config(tmp_path):
    result = dirl(tmp_path, "sft", "seed=7", "out=run")
    assert result == (0, "")
    assert [(tmp_path / f"run/rank{rank}").read_text() for rank in (0, 1)] == ["7 of 2", "7 of 2"]


@pytest.mark.slow
def test_a_process_that_fails_is_told_in_one_sentence(tmp_path):
    result = dirl(tmp_path, "sft", "steps=13", "out=run")
    assert result == (1, "dirl sft: 13 brings bad luck: take another number\n")
    assert not (tmp_path / "run/failure.txt").exists()


@pytest.mark.slow
def test_a_bug_in_a_process_shows_where(tmp_path):
    code, told = dirl(tmp_path, "sft", "steps=14", "out=run")
    assert code == 1
    assert "ZeroDivisionError: a bug" in told
    assert told.splitlines()[-1] == "dirl sft: a process failed, for the reason above"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_stop_with_their_parent_and_hold_the_directory_until_then(tmp_path, number):
    with start(tmp_path, "sft", "steps=15", "out=run", stderr=subprocess.PIPE) as parent:
        wait_for(tmp_path / "run/ready0", tmp_path / "run/ready1")
        assert (
            "in use by another process"
            in start(tmp_path, "sft", "steps=15", "out=run", stderr=subprocess.PIPE).communicate()[1]
        )
        parent.send_signal(number)
        assert parent.wait() != 0
    wait_for(tmp_path / "run/stopped0", tmp_path / "run/stopped1")


def wait_for(*files):
    while not all(file.exists() for file in files):
        time.sleep(0.1)
