"""What a run's own servers are started with, and what is said of those that end."""

import subprocess
import sys

import pytest
import torch

from dirl_cli.errors import DirlError
from dirl_cli.rollout.server_processes import (
    ADDRESS,
    ServerProcess,
    gpus_of_servers,
    server_environment,
    start_server,
    wait_for_servers,
)


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def test_servers_have_the_gpus_after_those_of_the_trainers(eight_gpus):
    assert gpus_of_servers(4, 4, {}) == ["4", "5", "6", "7"]
    assert gpus_of_servers(1, 2, {}) == ["1", "2"]


def test_of_the_gpus_that_the_run_may_see_servers_have_the_later_ones(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert gpus_of_servers(2, 2, {"CUDA_VISIBLE_DEVICES": "2,3,GPU-a,GPU-b"}) == ["GPU-a", "GPU-b"]


def test_too_few_gpus_are_told_in_one_sentence(eight_gpus):
    with pytest.raises(DirlError, match=r"gpus=6 and rollout.servers=3 want 9 GPUs, and there are 8 here: give fewer"):
        gpus_of_servers(6, 3, {})


def test_a_server_is_told_its_gpu_and_nothing_of_the_trainers_group():
    run = {"HOME": "/home/me", "DIRL_SERVE_KEY": "k", "RANK": "0", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2"}
    own = {"HOME": "/home/me", "DIRL_SERVE_KEY": "k", "PYTHONUNBUFFERED": "1"}
    assert server_environment(run, "2") == {**own, "CUDA_VISIBLE_DEVICES": "2"}
    assert server_environment(run, None) == {**own, "CUDA_VISIBLE_DEVICES": "0,1,2"}


def process_of(directory, code: str) -> ServerProcess:
    directory.mkdir()
    log = directory.with_name(f"{directory.name}.log")
    with log.open("w") as file:
        return ServerProcess(directory, subprocess.Popen([sys.executable, "-c", code], stdout=file))


def test_a_server_that_ends_at_its_start_is_told_with_its_last_lines(tmp_path):
    server = process_of(tmp_path / "0", "print('loading'); print('no room on the GPU'); raise SystemExit(1)")
    with pytest.raises(DirlError, match=r"ended before it answered \(loading / no room on the GPU\).* is in .*0\.log"):
        wait_for_servers([server], 60)


def test_a_server_that_does_not_answer_in_time_is_told_with_its_log(tmp_path):
    server = process_of(tmp_path / "0", "import time; time.sleep(60)")
    (tmp_path / "0" / ADDRESS).write_text("http://127.0.0.1:9")
    try:
        with pytest.raises(DirlError, match=r"does not answer within 0.2 s: see .*0\.log"):
            wait_for_servers([server], 0.2)
    finally:
        server.end()
    assert server.process.returncode


def test_the_key_is_on_no_command_line(tmp_path):
    directory = tmp_path / "0"
    directory.mkdir()
    server = start_server(directory, {"DIRL_SERVE_KEY": "the-secret-key"})
    server.end()
    assert "the-secret-key" not in " ".join(server.process.args)
