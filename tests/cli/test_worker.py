"""Commands in several processes: all read one config, and a failure is one sentence."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dirl_cli.cli.processes import start_workers
from dirl_cli.errors import DirlError

# Python imports this at every start; it puts a stand-in in the place of `dirl sft`.
STAND_IN = """
import os, signal, sys, time, types

def run(cfg, out):
    from accelerate import Accelerator
    from dirl_cli.errors import DirlError
    accelerator = Accelerator(cpu=True)
    (out / f"rank{accelerator.process_index}").write_text(f"{cfg.seed} of {accelerator.num_processes}")
    if cfg.steps == 13 and accelerator.process_index == 1:
        raise DirlError("13 brings bad luck: take another number")
    if cfg.steps == 14 and accelerator.process_index == 1:
        raise ZeroDivisionError("a bug")
    if cfg.steps in (16, 17):
        (out / f"ready{accelerator.process_index}").touch()
        if accelerator.process_index == 1 and cfg.steps == 16:
            raise DirlError("this was the first to go")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that waits for a GPU, which hears nothing
        time.sleep(600)
    if cfg.steps == 18:
        accelerator.wait_for_everyone()  # else gloo may tell of a connection that was never made
    if cfg.steps == 18 and accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.steps == 15:
        stop = lambda *_: (out / f"stopped{accelerator.process_index}").touch() or sys.exit()
        signal.signal(signal.SIGTERM, stop)
        (out / f"ready{accelerator.process_index}").touch()
        time.sleep(60)
    accelerator.wait_for_everyone()

sys.modules["dirl_cli.commands.sft"] = types.SimpleNamespace(run=run)
"""


def start(directory, *words, **streams):
    return call(directory, "dirl", *words, "gpus=2", "device=cpu", **streams)


def call(directory, program, *words, **streams):
    (directory / "sitecustomize.py").write_text(STAND_IN)
    environment = {**os.environ, "PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"}
    command = [Path(sys.executable).with_name(program), *words]
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
def test_a_process_that_is_killed_is_told_with_what_may_have_killed_it(tmp_path):
    hint = "; if nobody did, the machine may have run out of memory: give fewer gpus or a smaller batch"
    result = dirl(tmp_path, "sft", "steps=18", "out=run")
    assert result == (1, f"dirl sft: process 1 was killed by SIGKILL{hint}\n")


def test_more_processes_than_the_machine_has_gpus_are_refused_before_one_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_cuda_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("subprocess.Popen", None)
    cfg = OmegaConf.create({"gpus": 64, "nodes": 1, "device": "auto"})
    with pytest.raises(DirlError, match=r"^gpus=64: this machine has 2 GPUs: give no more, or device=cpu$"):
        start_workers("sft", cfg, tmp_path, [])


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


@pytest.mark.slow
def test_a_process_that_hears_no_signal_ends_with_the_one_that_failed(tmp_path):
    """Within seconds: torch alone would give it thirty, and it sleeps for ten minutes."""
    with start(tmp_path, "sft", "steps=16", "out=run", stderr=subprocess.PIPE) as process:
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (1, "dirl sft: this was the first to go\n")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_processes_that_do_not_heed_the_first(tmp_path):
    with start(tmp_path, "sft", "steps=17", "out=run", stderr=subprocess.PIPE) as parent:
        wait_for(tmp_path / "run/ready0", tmp_path / "run/ready1")
        parent.send_signal(signal.SIGINT)
        time.sleep(2)
        assert parent.poll() is None
        parent.send_signal(signal.SIGINT)
        assert parent.wait(timeout=60) != 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--nproc_per_node", "2"],
        ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"],
    ],
)
def test_a_launcher_of_the_users_own_starts_what_was_prepared(tmp_path, launcher):
    with call(
        tmp_path, "dirl", "sft", "seed=7", "out=run", "device=cpu", "prepare=true", stdout=subprocess.PIPE
    ) as one:
        told, _ = one.communicate()
    assert told.endswith("torchrun --nproc_per_node N -m dirl_cli.cli.worker sft run\n")
    assert not (tmp_path / "run/rank0").exists()
    with call(tmp_path, *launcher, "-m", "dirl_cli.cli.worker", "sft", "run") as process:
        assert process.wait() == 0
    assert [(tmp_path / f"run/rank{rank}").read_text() for rank in (0, 1)] == ["7 of 2", "7 of 2"]


@pytest.mark.slow
def test_two_machines_are_given_the_same_command_and_a_number_each(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"main_address=127.0.0.1:{free.getsockname()[1]}"
    nodes = [start(tmp_path, "sft", "seed=7", "out=run", "nodes=2", address, f"node_rank={rank}") for rank in (0, 1)]
    assert [node.wait() for node in nodes] == [0, 0]
    assert [(tmp_path / f"run/rank{rank}").read_text() for rank in range(4)] == ["7 of 4"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_the_jobs_of_a_sweep_may_have_several_processes_each(tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    with start(tmp_path, "sft", "-m", "seed=1,2", "out=run", f"hydra/launcher={launcher}") as sweep:
        assert sweep.wait() == 0
    for seed in (1, 2):
        told = [(tmp_path / f"run/seed={seed}/rank{rank}").read_text() for rank in (0, 1)]
        assert told == [f"{seed} of 2"] * 2


def wait_for(*files):
    while not all(file.exists() for file in files):
        time.sleep(0.1)
