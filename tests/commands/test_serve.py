"""`dirl serve` as a command: keys, addresses, lengths, and a process that signals end."""

import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
import torch

pytest.importorskip("starlette", reason="dirl serve wants starlette: make install brings it")

from dirl_cli.commands import serve
from dirl_cli.errors import DirlError
from dirl_cli.serving.listen import address_of, listener_at
from dirl_cli.types import Decoding
from tests.helpers.command_line import dirl
from tests.helpers.paths import ROOT
from tests.helpers.served import speaking_lm
from tests.helpers.small import small_lm


def settings(**changes):
    return SimpleNamespace(**{"key": None, "host": "127.0.0.1"} | changes)


def test_a_key_is_the_settings_the_environments_or_a_new_one_that_is_told(monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    assert serve.key_of(settings(key="mine")) == ("mine", False)
    (one, is_new), (other, _) = serve.key_of(settings()), serve.key_of(settings())
    assert is_new and one != other and len(one) >= 32
    monkeypatch.setenv(serve.KEY_VARIABLE, "of the environment")
    assert serve.key_of(settings()) == ("of the environment", False)
    assert serve.key_of(settings(key="none")) == (None, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::", "example.org"])
def test_a_server_that_others_reach_has_a_key(host):
    with pytest.raises(DirlError, match=r"lets other machines in, and serve.key=none all of them: give a key in DIRL_"):
        serve.key_of(settings(key="none", host=host))
    assert serve.key_of(settings(key="none", host="::1")) == serve.key_of(settings(key="none", host="localhost"))


def test_an_answer_has_room_for_whole_blocks_within_the_models_positions():
    lm = small_lm()  # 256 positions, blocks of four
    assert [serve.served_length(length, lm) for length in (None, 1000, 66)] == [256, 256, 64]
    with pytest.raises(DirlError, match=r"serve.max_length=3 is less than a block of 4 tokens: give more"):
        serve.served_length(3, lm)


@pytest.mark.parametrize(("cores", "threads", "left"), [(8, 8, 7), (8, 3, 3), (2, 2, 1), (1, 1, 1)])
def test_a_core_is_left_to_http(monkeypatch, cores, threads, left):
    given = []
    monkeypatch.setattr(serve, "cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", given.append)  # the real one is for a process without other threads
    serve.leave_a_core()
    assert given == [left]


def test_a_port_that_is_taken_is_told():
    with listener_at("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener) == f"http://127.0.0.1:{port}"
        sentence = rf"serve.port={port} cannot be listened at .*or serve.port=0 for a free one"
        with pytest.raises(DirlError, match=sentence):
            listener_at("127.0.0.1", port)


def test_a_package_that_is_missing_is_told_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(DirlError, match=r"dirl serve wants uvicorn: pip install"):
        serve.run(None, None)


def test_a_model_has_to_be_given(here):
    refused = dirl("serve")
    assert refused.exit_code == 1 and "give a value for model.path" in refused.stderr


def test_a_decoding_that_nothing_can_be_answered_by_is_told_before_anybody_asks(here):
    refused = dirl("serve", "model=path", "model.path=nowhere", "decoding.strategy=sequental")
    assert refused.exit_code == 1 and "no decoding strategy is called sequental: did you mean seq" in refused.stderr
    lm = small_lm()
    serve.require_own_block_size(Decoding(block_size=lm.block_size), lm)
    with pytest.raises(DirlError, match=r"decoding.block_size is 8 and the model's is 4: leave it"):
        serve.require_own_block_size(Decoding(block_size=8), lm)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_process_answers_until_a_signal_and_leaves_without_a_traceback(tmp_path, number, code):
    speaking_lm().save(tmp_path / "model")
    words = ["serve", f"model={tmp_path}/model", "serve.port=0", "device=cpu", "rollout.max_batch=2"]
    command = [sys.executable, "-c", "from dirl_cli.cli.app import app; app()", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    environment.pop(serve.KEY_VARIABLE, None)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        said = process.stdout.readline() + process.stdout.readline()
        [address] = re.findall(r"http://\S+/v1", said)
        [key] = re.findall(r"^key: (\S+)$", said, re.M)
        body = {"prompt": "How many", "max_tokens": 8}
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.post(f"{address}/completions", json=body, headers=headers, timeout=60).status_code == 200
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in out + err
    assert err.endswith("stopped: what was under way is finished or given back\n")


def test_a_server_that_a_run_starts_again_listens_where_it_did(tmp_path):
    assert serve.earlier_port(None) is None and serve.earlier_port(tmp_path) is None
    (tmp_path / serve.ADDRESS).write_text("http://[::1]:8123")
    assert serve.earlier_port(tmp_path) == 8123
