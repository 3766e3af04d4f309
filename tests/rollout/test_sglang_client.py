"""Sampling with SGLang's servers: the native engine's answers, out of responses in SGLang's format."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("starlette", reason="SGLang's stand-in wants starlette: make install brings it")

from dirl_cli.errors import DirlError
from dirl_cli.models.load import SavedModel
from dirl_cli.rollout import server_pool
from dirl_cli.rollout.engines import Servers
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.sampler import Stint
from dirl_cli.rollout.server_client import Patience, ServerFailed
from dirl_cli.rollout.server_sampler import ServerSampler
from dirl_cli.rollout.sglang_client import AnswerStream, message_of
from dirl_cli.rollout.sglang_plugin import require_version
from dirl_cli.rollout.storage import rollout_path
from dirl_cli.types import Decoding
from tests.helpers import rl_runs
from tests.helpers.fake_sglang import FakeSglang, serving
from tests.helpers.served import speaking_lm

PROMPTS = [[20, 30, 40], [50, 60, 70, 80], [90] * 9]
SEEDS = [2**62 + 1, 5, 6]
PATIENCE = Patience(silence=30, push=30, outage=5)


@pytest.fixture(autouse=True)
def quick_returns(monkeypatch):
    monkeypatch.setattr(server_pool, "FIRST_PAUSE", 0.02)


@pytest.fixture(scope="module")
def lm():
    return speaking_lm(3)


@contextmanager
def sampler_of(lm, directory, *fakes: FakeSglang, patience: Patience = PATIENCE, key=None) -> Iterator[ServerSampler]:
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(fake)) for fake in fakes]
        yield ServerSampler(lm, urls, directory / "weights", 8, patience, key, is_sglang=True)


def answers_of(sampler, decoding, n=2, stint=None):
    stream = sampler.stream(PROMPTS, n, decoding, seeds=SEEDS, stint=stint)
    return {(prompt, i): answer for prompt, i, answer in stream}


def assert_same(answers, expected):
    assert answers.keys() == expected.keys()
    for key, answer in answers.items():
        assert replace(answer, logprobs=[], forwards=0) == replace(expected[key], logprobs=[], forwards=0)
        assert answer.logprobs == pytest.approx(expected[key].logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "strategy": "low_confidence_static", "denoising_steps": 2},
        {"temperature": 1.0, "strategy": "entropy_bounded", "threshold": 1.5},
        {"temperature": 1.0, "strategy": "probability_margin", "threshold": 0.3, "confidence": "max"},
        {"temperature": 1.0, "strategy": "bounded_adaptive", "threshold": 0.9, "lowest_threshold": 0.2},
        {"strategy": "sequential"},
        {"temperature": 1.0, "threshold": 0.6, "threshold_by_step": -0.4, "threshold_by_position": 0.2},
    ],
    ids=lambda options: options.get("strategy", "dynamic") + str(len(options)),
)
def test_the_answers_are_the_native_engines_token_by_token_and_step_by_step(lm, tmp_path, options):
    decoding = lm.decoding(Decoding(**options, max_new_tokens=10))  # which no block ends with
    fake = FakeSglang(speaking_lm(5))  # that begins with other weights
    with sampler_of(lm, tmp_path, fake) as sampler:
        answers = answers_of(sampler, decoding)
    assert_same(answers, answers_of(NativeSampler(lm, max_batch=1), decoding))


def test_a_stop_token_ends_the_answer_and_its_whole_block_is_told(lm, tmp_path):
    free = answers_of(NativeSampler(lm, max_batch=1), Decoding(temperature=1.0, max_new_tokens=16))
    stops = tuple({answer.token_ids[5] for answer in free.values()})
    decoding = Decoding(temperature=1.0, max_new_tokens=16, stop_token_ids=stops)
    expected = answers_of(NativeSampler(lm, max_batch=1), decoding)
    assert {answer.stop_reason for answer in expected.values()} == {"stop"}
    for incremental in (False, True):
        with sampler_of(lm, tmp_path, FakeSglang(speaking_lm(3), incremental=incremental)) as sampler:
            assert_same(answers_of(sampler, decoding), expected)


def test_weights_go_over_the_disk_and_answers_carry_their_version(lm, tmp_path):
    fake = FakeSglang(speaking_lm(5))
    decoding = Decoding(temperature=1.0, max_new_tokens=8)
    with sampler_of(lm, tmp_path, fake) as sampler:
        sampler.update_weights(lm.model.named_parameters(), 7)
        answers = answers_of(sampler, decoding)
    assert [push["model_path"] for push in fake.pushes] == [str(tmp_path / "weights" / "version-000007")]
    assert fake.weight_version == f"7:{sampler.pool.weights.sha256}"
    assert {answer.weights_version for answer in answers.values()} == {7}


def test_weights_of_somebody_else_are_no_answer_and_are_replaced(lm, tmp_path):
    fake = FakeSglang(speaking_lm(3))
    decoding = Decoding(temperature=1.0, max_new_tokens=8)
    with sampler_of(lm, tmp_path, fake) as sampler:
        sampler.update_weights(lm.model.named_parameters(), 7)
        fake.weight_version = "8:somebody's"
        versions = {answer.weights_version for answer in answers_of(sampler, decoding).values()}
    assert versions == {7}
    assert len(fake.pushes) == 2


def test_what_one_server_does_not_answer_another_does(lm, tmp_path):
    broken = FakeSglang(speaking_lm(3), spoil=lambda chunk: {"meta_info": {}})
    decoding = Decoding(temperature=1.0, max_new_tokens=8)
    with sampler_of(lm, tmp_path, broken, FakeSglang(speaking_lm(3))) as sampler:
        assert_same(answers_of(sampler, decoding), answers_of(NativeSampler(lm, max_batch=1), decoding))
    assert broken.requests


def test_a_busy_server_is_asked_again(lm, tmp_path):
    fake = FakeSglang(speaking_lm(3), refusal=(503, "The request queue is full."))
    decoding = Decoding(temperature=1.0, max_new_tokens=8)
    with sampler_of(lm, tmp_path, fake) as sampler:
        threading.Timer(0.3, lambda: setattr(fake, "refusal", None)).start()
        assert_same(answers_of(sampler, decoding), answers_of(NativeSampler(lm, max_batch=1), decoding))


def test_a_stream_that_is_aborted_is_asked_again_and_a_wrong_request_is_not(lm, tmp_path):
    reasons = [{"type": "abort", "message": "Abort in waiting queue", "status_code": 500}]

    def aborted(chunk):
        if reasons:
            chunk["meta_info"]["finish_reason"] = reasons.pop()
        return chunk

    fake = FakeSglang(speaking_lm(3), spoil=aborted)
    decoding = Decoding(temperature=1.0, max_new_tokens=8)
    with sampler_of(lm, tmp_path, fake) as sampler:
        assert_same(answers_of(sampler, decoding), answers_of(NativeSampler(lm, max_batch=1), decoding))
        reasons.append({"type": "abort", "message": "it is too long", "status_code": 400})
        with pytest.raises(DirlError, match="refuses what it is asked: it is too long"):
            answers_of(sampler, decoding)


def test_an_engine_without_a_sign_of_life_is_left_out(lm, tmp_path):
    held = threading.Event()
    fake = FakeSglang(speaking_lm(3), is_alive=False, before_chunk=lambda: held.wait(10))
    decoding = Decoding(temperature=1.0, max_new_tokens=8)
    with sampler_of(lm, tmp_path, fake, FakeSglang(speaking_lm(3)), patience=replace(PATIENCE, silence=0.3)) as sampler:
        assert_same(answers_of(sampler, decoding), answers_of(NativeSampler(lm, max_batch=1), decoding))
        assert sampler.pool.servers[0].failure == "takes no step in 0.3 s"
        held.set()


def test_an_answer_goes_on_from_the_blocks_that_it_has(lm, tmp_path):
    decoding = Decoding(temperature=1.0, max_new_tokens=16)
    expected = answers_of(NativeSampler(lm, max_batch=1), decoding, n=1)
    so_far = {}
    for (prompt, sample), answer in expected.items():
        kept = -len(PROMPTS[prompt]) % lm.block_size + lm.block_size
        parts = {name: getattr(answer, name)[:kept] for name in ("token_ids", "reveal_step", "logprobs")}
        so_far[prompt, sample] = replace(answer, **parts, denoise_forwards=0, forwards=0)
    fake = FakeSglang(speaking_lm(3))
    with sampler_of(lm, tmp_path, fake) as sampler:
        answers = answers_of(sampler, decoding, n=1, stint=Stint(len(PROMPTS), under_way=so_far))
    for key, answer in answers.items():
        assert (answer.token_ids, answer.reveal_step) == (expected[key].token_ids, expected[key].reveal_step)


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_run_learns_from_the_answers_that_its_own_sampler_would_give(tmp_path, ahead):
    model = rl_runs.save_sharp_model(tmp_path / "model")
    words = ("steps=2", "eval_problems=2", "save_every=0", "show_every=0", f"rl.async_rollout={ahead}")
    rl_runs.run(rl_runs.config(model, *words), tmp_path / "own")
    fake = FakeSglang(SavedModel("sharp", str(model)).load("float32", "cpu", "sdpa"))
    fake.info["max_req_input_len"] = 1000
    with serving(fake) as url:
        served = ("rollout=sglang", f"rollout.url=[{url}]", f"rollout.directory={tmp_path}/weights")
        rl_runs.run(rl_runs.config(model, *words, *served), tmp_path / "served")

    # Of the first step; log-probs, and so what is learned, are the same to rounding.
    own, other = (read_rollout(tmp_path / name / "rollouts", 1) for name in ("own", "served"))
    assert [tokens_of(record) for record in own] == [tokens_of(record) for record in other]
    assert fake.weight_version.startswith("2:")


def read_rollout(directory, step):
    return [json.loads(line) for line in rollout_path(directory, step).read_text().splitlines()]


def tokens_of(record):
    return {name: record[name] for name in ("prompt_ids", "token_ids", "reveal_step", "weights_version")}


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        ({"version": "0.5.20"}, "has SGLang 0.5.20, and rollout=sglang works with 0.5.23 alone"),
        ({"dllm_algorithm": "LowConfidence"}, "runs the algorithm LowConfidence, which tells of no steps"),
        ({"max_req_input_len": 4}, "start it with --context-length="),
    ],
)
def test_a_server_that_is_started_otherwise_is_told_at_once(lm, tmp_path, info, sentence):
    fake = FakeSglang(speaking_lm(3))
    fake.info |= info
    with sampler_of(lm, tmp_path, fake) as sampler, pytest.raises(DirlError, match=sentence):
        answers_of(sampler, Decoding(max_new_tokens=8))


def test_a_key_is_shown_and_a_wrong_one_told(lm, tmp_path):
    decoding = Decoding(max_new_tokens=4)
    with sampler_of(lm, tmp_path, FakeSglang(speaking_lm(3), key="right"), key="right") as sampler:
        assert len(answers_of(sampler, decoding)) == 6
    fake = FakeSglang(speaking_lm(3), key="right")
    wrong = pytest.raises(DirlError, match="wants its --api-key")
    with sampler_of(lm, tmp_path, fake, key="wrong") as sampler, wrong:
        answers_of(sampler, decoding)


def test_an_end_that_was_not_asked_for_is_told(lm, tmp_path):
    answer = answers_of(NativeSampler(lm, max_batch=1), Decoding(max_new_tokens=8), n=1)[0, 0]
    fake = FakeSglang(speaking_lm(3), eos=(answer.token_ids[2],))
    told = pytest.raises(DirlError, match=f"at token {answer.token_ids[2]}, .* add it to decoding.stop_token_ids")
    with sampler_of(lm, tmp_path, fake) as sampler, told:
        answers_of(sampler, Decoding(max_new_tokens=8), n=1)


def test_a_failed_push_leaves_the_server_out(lm, tmp_path):
    fake = FakeSglang(speaking_lm(3))
    with sampler_of(lm, tmp_path, fake) as sampler:
        client = sampler.pool.servers[0].client
        work = client.take({"path": str(tmp_path / "nowhere")}, WeightsId(1, "0" * 64), sampler.loop.time() + 30)
        with pytest.raises(ServerFailed, match=r"took no new weights: .*nowhere"):
            asyncio.run_coroutine_threadsafe(work, sampler.loop).result(30)


def test_a_block_that_is_left_out_is_noticed():
    stream = AnswerStream({"prompt": [1, 2, 3], "answer_ids": None, "stop_token_ids": None}, 4)
    block = {"token_ids": [5] * 4, "reveal_step": [1] * 4, "logprobs": [-1.0] * 4, "denoise_forwards": 1, "forwards": 2}
    meta_info = {"dirl": [block | {"start": 1}], "weight_version": "3:a", "finish_reason": None}
    with pytest.raises(ServerFailed, match="leaves tokens of an answer out"):
        stream.blocks(meta_info)


def test_versions_that_work_are_the_one_that_was_read_and_its_post_releases():
    require_version("0.5.23", "it")
    require_version("0.5.23.post1", "it")
    for other in ("0.5.22", "0.5.24", "0.5.230", "0.6.0"):
        with pytest.raises(DirlError, match=f"it has SGLang {other}, .* pip install sglang==0.5.23"):
            require_version(other, "it")


def test_errors_are_told_in_each_of_sglangs_shapes():
    assert message_of(b'{"error": {"message": "a"}}') == "a"
    assert message_of(b'{"error": "b"}') == "b"
    assert message_of(b'{"success": false, "message": "c"}') == "c"
    assert message_of(b"<html>") == "<html>"
    assert message_of(b"") == "an empty response"


def test_the_choice_wants_addresses_and_starts_no_servers():
    servers = Servers((), None, "sglang", "w", 8, 60, 60, 60)
    for wrong in (servers, replace(servers, servers=2), replace(servers, url=("http://a:1",), servers=2)):
        with pytest.raises(DirlError, match=r"rollout=sglang wants the addresses .*rollout.url=\[http://HOST:30000\]"):
            wrong.require()
    replace(servers, url=("http://a:30000",)).require()
