"""`dirl serve`: answers that are the sampler's own, errors in OpenAI's shape, and a server that mixes nothing up."""

import asyncio
import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace

import httpx
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

pytest.importorskip("starlette", reason="dirl serve wants starlette: make install brings it")

from dirl_cli.commands import generate
from dirl_cli.data.chat import answer_text, encode_messages
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.pushed_weights import write_weights
from dirl_cli.rollout.sampler import NewBlock
from dirl_cli.serving import request_body, routes, stored_weights
from dirl_cli.serving.growing_text import GrowingText
from dirl_cli.serving.refusals import Refusal
from dirl_cli.serving.request_body import COMMON, DECODING_FIELDS, NEUTRAL, WITHOUT_EFFECT, RequestReader
from dirl_cli.serving.response_body import ResponseWriter
from dirl_cli.serving.service import AnswerState
from dirl_cli.types import Decoding, Trajectory
from tests.helpers.served import KEY, listening, served, speaking_lm, wait_until

WARM = {"temperature": 1.0, "seed": 7, "max_tokens": 12}
DECODING = Decoding(temperature=1.0, seed=7, max_new_tokens=12)
PROMPTS = [[20, 30, 40], [50, 60, 70, 80], [90] * 9, [25, 35]]
QUESTION = [{"role": "user", "content": "How many pens?"}]
EXACT = ("prompt_ids", "token_ids", "reveal_step", "stop_reason", "denoise_forwards", "forwards", "stop_token_ids")


@pytest.fixture(scope="module")
def lm():
    return speaking_lm()


@pytest.fixture(scope="module")
def server(lm):
    with served(lm) as one:
        yield one


def same(told: dict, expected: Trajectory) -> None:
    """A trajectory as it was sent is the sampler's, to the last token and step, and to rounding in its log-probs."""
    assert told.keys() == {field.name for field in fields(Trajectory)} - {"versions", "entropies"}
    plain = json.loads(json.dumps(asdict(expected)))
    assert {name: told[name] for name in EXACT} == {name: plain[name] for name in EXACT}
    assert told["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)


def events_of(response) -> list[dict]:
    """What a stream holds, its end left out."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# Answers


def test_an_answer_is_the_samplers_of_the_same_seed(lm, server):
    decoding = lm.decoding(DECODING)
    body = server.client.post("/v1/completions", json={"model": "tiny", "prompt": PROMPTS, "n": 2, **WARM}).json()
    expected = [one for group in NativeSampler(lm).sample(PROMPTS, 2, decoding) for one in group]
    assert [choice["index"] for choice in body["choices"]] == list(range(8))
    for choice, one in zip(body["choices"], expected, strict=True):
        same(choice["trajectory"], one)
        ids = one.completion_ids[:12]
        assert choice["text"] == answer_text(lm.tokenizer, ids)
        is_stopped = one.stop_reason == "stop" and len(one.completion_ids) < 12
        assert choice["finish_reason"] == ("stop" if is_stopped else "length")
    tokens = sum(len(one.completion_ids[:12]) for one in expected)
    assert body["usage"] == {"prompt_tokens": 18, "completion_tokens": tokens, "total_tokens": 18 + tokens}
    assert body["seed"] == 7


def test_alone_in_its_batch_an_answer_has_the_samplers_very_log_probs(lm, server):
    body = server.client.post("/v1/completions", json={"prompt": PROMPTS[0], **WARM}).json()
    [[one]] = NativeSampler(lm).sample([PROMPTS[0]], 1, lm.decoding(DECODING))
    assert body["choices"][0]["trajectory"]["logprobs"] == one.logprobs


def test_a_chat_is_put_as_generate_puts_it_and_text_as_it_is_written(lm, server):
    body = server.client.post("/v1/chat/completions", json={"messages": QUESTION, **WARM}).json()
    prompt_ids = encode_messages(lm.tokenizer, QUESTION)
    [[one]] = NativeSampler(lm).sample([prompt_ids], 1, lm.decoding(DECODING))
    [choice] = body["choices"]
    same(choice["trajectory"], one)
    assert choice["message"] == {"role": "assistant", "content": answer_text(lm.tokenizer, one.completion_ids[:12])}
    parts = [{"role": "user", "content": [{"type": "text", "text": "How many pens?"}]}]
    again = server.client.post("/v1/chat/completions", json={"messages": parts, **WARM}).json()
    assert again["choices"] == body["choices"]

    text = server.client.post("/v1/completions", json={"prompt": "How many", **WARM}).json()
    ids = lm.tokenizer("How many", add_special_tokens=False)["input_ids"]
    assert text["choices"][0]["trajectory"]["prompt_ids"] == ids


def test_an_answer_is_the_one_that_dirl_generate_writes(lm, server, tmp_path):
    lm.save(tmp_path / "model")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("generate", ["~experiment", "model=path", f"model.path={tmp_path}/model", "device=cpu"])
    changes = {"prompt": "How many pens?", "samples": 2, "attention": "sdpa"}
    changes |= {"decoding.temperature": 1.0, "decoding.max_new_tokens": 12, "decoding.seed": 7}
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value)
    OmegaConf.resolve(cfg)
    generate.run(cfg, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/completions.jsonl").read_text().splitlines()]

    body = server.client.post("/v1/chat/completions", json={"messages": QUESTION, "n": 2, **WARM}).json()
    for choice, line in zip(body["choices"], sorted(lines, key=lambda line: line["sample"]), strict=True):
        for name in ("prompt_ids", "token_ids", "reveal_step", "stop_reason", "forwards"):
            assert choice["trajectory"][name] == line[name]
        assert choice["trajectory"]["logprobs"] == pytest.approx(line["logprobs"], abs=1e-5)
        assert line["text"].startswith(choice["message"]["content"])


def test_without_a_seed_answers_differ_and_each_can_be_asked_for_again(server):
    asked = {"prompt": PROMPTS[0], "temperature": 1.0}
    first, second = (server.client.post("/v1/completions", json=asked).json() for _ in range(2))
    assert first["choices"][0]["trajectory"]["token_ids"] != second["choices"][0]["trajectory"]["token_ids"]
    again = server.client.post("/v1/completions", json={**asked, "seed": first["seed"]}).json()
    assert again["choices"] == first["choices"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_brings_the_same_answer_block_by_block(server, path):
    asked = {"prompt": PROMPTS[0]} if path == "/v1/completions" else {"messages": QUESTION}
    asked |= {**WARM, "n": 2, "logprobs": 0 if path == "/v1/completions" else True}
    whole = server.client.post(path, json=asked).json()
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    with server.client.stream("POST", path, json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events_of(response)
    assert last["usage"] == whole["usage"] and last["choices"] == []
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert len(own) >= 3, "a chunk a block"
        if path == "/v1/completions":
            assert "".join(c["text"] for c in own) == choice["text"]
            logprobs = [value for c in own for value in c["logprobs"]["token_logprobs"]]
            assert logprobs == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)
            assert [v for c in own for v in c["logprobs"]["text_offset"]] == choice["logprobs"]["text_offset"]
        else:
            assert own[0]["delta"]["role"] == "assistant"
            assert "".join(c["delta"]["content"] for c in own) == choice["message"]["content"]
            assert [v["token"] for c in own for v in c["logprobs"]["content"]] == [
                v["token"] for v in choice["logprobs"]["content"]
            ]
        for name in ("token_ids", "reveal_step"):
            assert [v for c in own for v in c["trajectory"][name]] == choice["trajectory"][name]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert own[-1]["trajectory"]["forwards"] == choice["trajectory"]["forwards"]


def test_openais_own_field_of_log_probs_holds_those_of_the_text(lm, server):
    asked = {"prompt": PROMPTS[0], "logprobs": 0, **WARM}
    [choice] = server.client.post("/v1/completions", json=asked).json()["choices"]
    told = choice["logprobs"]
    token_ids = choice["trajectory"]["token_ids"][: len(told["tokens"])]
    assert told["tokens"] == [lm.tokenizer.decode([token]) for token in token_ids]
    assert told["token_logprobs"] == choice["trajectory"]["logprobs"][: len(told["tokens"])]
    assert told["text_offset"][:2] == [0, len(told["tokens"][0])]


def test_a_stop_string_ends_an_answer_at_its_block_and_is_not_part_of_the_text(server):
    asked = {"prompt": PROMPTS[1], **WARM, "max_tokens": 40}
    [free] = server.client.post("/v1/completions", json=asked).json()["choices"]
    stop = free["text"][3:6]
    [cut] = server.client.post("/v1/completions", json={**asked, "stop": [stop, "never"]}).json()["choices"]
    assert cut["text"] == free["text"][: free["text"].index(stop)] and cut["finish_reason"] == "stop"
    tokens, all_tokens = cut["trajectory"]["token_ids"], free["trajectory"]["token_ids"]
    assert tokens == all_tokens[: len(tokens)] and len(tokens) < len(all_tokens)
    assert cut["trajectory"]["forwards"] < free["trajectory"]["forwards"]
    wait_until(lambda: not server.engine.running)


def test_each_request_is_decoded_as_it_says_though_all_share_forwards(lm):
    """Twelve at once, of different strategies, temperatures and lengths: each is what the sampler says to it alone."""
    settings = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5, "strategy": "sequential"},
        {"temperature": 1.0, "top_p": 0.8, "strategy": "low_confidence_static", "denoising_steps": 2},
        {"temperature": 1.0, "strategy": "entropy_bounded", "threshold": 2.0, "confidence": "entropy"},
        {"temperature": 1.0, "strategy": "sequential", "denoising_steps": 1, "stop_token_ids": [33]},
        {"temperature": 1.0, "strategy": "bounded_adaptive", "threshold": 0.5, "lowest_threshold": 0.1},
        {"temperature": 1.0, "threshold": 0.4, "threshold_by_step": -0.3, "threshold_by_position": 0.3},
    ]
    with listening(lm, max_batch=6) as (address, _, _):

        def ask(i: int) -> dict:
            body = {"prompt": PROMPTS[i % 4], "seed": i, "max_tokens": 8 + 4 * (i % 3), **settings[i % len(settings)]}
            response = httpx.post(
                f"{address}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
            )
            return response.json()["choices"][0]["trajectory"]

        with ThreadPoolExecutor(12) as pool:
            told = list(pool.map(ask, range(12)))
    for i, trajectory in enumerate(told):
        options = {**settings[i % len(settings)]}
        stops = tuple(options.pop("stop_token_ids", ()))
        decoding = Decoding(**options, seed=i, max_new_tokens=8 + 4 * (i % 3), stop_token_ids=stops)
        [[expected]] = NativeSampler(lm).sample([PROMPTS[i % 4]], 1, lm.decoding(decoding))
        same(trajectory, expected)


# Errors


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({}, 400, "prompt must be text or a list of token ids"),
        ({"prompt": []}, 400, "prompt must be text or a list of token ids"),
        ({"prompt": [[1], "a"]}, 400, "prompt must be text, or a list of token ids below"),
        ({"prompt": [10**6]}, 400, "list of token ids below"),
        ({"prompt": "a", "model": "other"}, 404, "no model is called other here: choose one of tiny"),
        ({"prompt": "a", "temperatur": 1}, 400, "temperatur: no such field; did you mean temperature?"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature=hot: give a number of at least 0"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature=-1: give a number of at least 0"),
        ({"prompt": "a", "temperature": True}, 400, "temperature=true: give a number of at least 0"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens=0: give a whole number of at least 1"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens=1.5: give a whole number of at least 1"),
        ({"prompt": "a", "seed": -1}, 400, "seed=-1: give a whole number of at least 0"),
        ({"prompt": "a", "temperature": 1e-40}, 400, "give 0, which is greedy, or at least 0.01"),
        ({"prompt": "a", "denoising_steps": 10**30}, 400, "give at most 2147483647"),
        ({"prompt": "a", "top_p": 1e-60}, 400, "top_p=1e-60: give at least 0.000001, or top_k=1"),
        ({"prompt": "a", "n": 10**400}, 400, "give at most 2147483647"),
        ({"prompt": "a", "denoising_steps": 10**6}, 400, "denoising_steps may be 4096 at most: give fewer"),
        ({"prompt": "a", "stop_token_ids": [10**30]}, 400, "give at most 2147483647"),
        ({"prompt": "a", "stop_token_ids": [10**6]}, 400, "stop_token_ids may hold 64 token ids below"),
        ({"prompt": "a", "stop_token_ids": [1] * 65}, 400, "stop_token_ids may hold 64 token ids below"),
        ({"prompt": "a", "stop_token_ids": []}, 400, "stop_token_ids holds none: leave it out"),
        ({"prompt": "a", "stop": ["a" * 257]}, 400, "none of more than 256 letters"),
        ({"prompt": ""}, 400, "a prompt holds no token: give at least one"),
        ({"prompt": ["a", ""]}, 400, "a prompt holds no token: give at least one"),
        ({"prompt": ["a"] * 2000}, 400, "2000 prompts are more than 1024: give fewer"),
        ({"prompt": "a" * 100_000}, 400, "a prompt has 100000 letters, more than the 127 tokens"),
        ({"prompt": "a", "threshold": 2}, 400, "confidence is at most 1"),
        ({"prompt": "a", "strategy": "sequental"}, 400, "strategy=sequental: did you mean sequential?"),
        ({"prompt": "a", "strategy": "os.system"}, 400, "strategy=os.system: choose one of"),
        ({"prompt": "a", "stop": [""]}, 400, "stop must be a text or a list of at most 64, none empty"),
        ({"prompt": "a", "stop_token_ids": 3}, 400, "stop_token_ids=3: give a list"),
        ({"prompt": "a", "n": 13}, 400, "13 answers are more than the 12 that are let in at once: ask for fewer"),
        ({"prompt": "a", "echo": True}, 400, "echo is nothing that a block-diffusion engine has: leave it out"),
        ({"prompt": "a", "logprobs": 5}, 400, "none are kept: give 0"),
        ({"prompt": "a", "stream": "yes"}, 400, "stream=yes: give true or false"),
        (
            {"prompt": [20], "answer_ids": [1] * 4},
            400,
            "ends at token 5 with its prompt: give whole blocks of 4",
        ),
        ({"prompt": [20] * 4, "answer_ids": [1] * 16}, 400, "and fewer than the answer may have"),
        ({"prompt": [20] * 4, "answer_ids": [1] * 4, "n": 2}, 400, "the one answer to one prompt goes on from"),
        ({"prompt": [20] * 4, "answer_ids": [10**6] * 4}, 400, "answer_ids must be a list of token ids"),
        ({"prompt": "a", "max_tokens": 3, "max_completion_tokens": 3}, 400, "mean the same: give one"),
        ({"prompt": [20] * 128}, 400, "a prompt has 128 tokens and there is room for 127: shorten it"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence_of_openais_shape(server, body, status, sentence):
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert sentence in error["message"] and error.keys() == {"message", "type", "param", "code"}
    assert ":" in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        (None, "messages must be a list of objects with role and content"),
        ([], "messages must be a list of objects with role and content"),
        ([{"role": "user"}], "messages turn 1: messages must be a list of objects with role and"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages turn 1"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_told(server, messages, sentence):
    response = server.client.post("/v1/chat/completions", json={"messages": messages})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert sentence in response.json()["error"]["message"]


ODD = [
    None,
    True,
    0,
    -1,
    1,
    2,
    0.5,
    10**40,
    10**400,
    1e308,
    -0.0,
    "",
    "a",
    "sequential",
    [],
    [[]],
    [1],
    ["a"],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("seed", range(2))
def test_whatever_a_body_holds_it_is_answered_or_refused_and_the_next_one_is_answered(lm, server, seed):
    rng = random.Random(seed)
    keys = sorted({*DECODING_FIELDS, *COMMON, *NEUTRAL, *WITHOUT_EFFECT, "prompt", "messages", "unknown"})
    for _ in range(150):
        path = rng.choice(["/v1/completions", "/v1/chat/completions", "/update_weights"])
        body = {key: rng.choice(ODD) for key in rng.sample(keys, rng.randint(0, 3))}
        if rng.random() < 0.7:
            body |= {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
        response = server.client.post(path, json=body)
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code != 200:
            assert response.json()["error"]["message"].strip()
    wait_until(lambda: not server.engine.running)
    assert server.client.post("/v1/completions", json={"prompt": PROMPTS[0]}).status_code == 200


def test_a_key_has_to_be_shown_everywhere_but_to_ask_for_health(server):
    for method, path in [("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/sleep"), ("POST", "/v1/completions")]:
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            refused = server.client.request(method, path, headers=headers)
            assert refused.status_code == 401
            assert "send Authorization: Bearer KEY" in refused.json()["error"]["message"]
    assert server.client.get("/health", headers={"Authorization": ""}).json()["status"] == "ok"


def test_a_server_without_a_key_lets_everybody_in_but_a_web_page(lm):
    with served(lm, key=None) as open_server:
        assert open_server.client.get("/v1/models").status_code == 200
        refused = open_server.client.post("/sleep", headers={"Origin": "https://elsewhere.example"})
        assert refused.status_code == 403 and not open_server.engine.is_asleep


def test_paths_bodies_and_methods_that_are_not_served_are_refused_in_the_same_shape(server):
    client = server.client
    assert client.get("/v1/embeddings").status_code == 404
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/v1/models/other").status_code == 404
    for content, kind, status in [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "a", "model": "\\uDfff"}', "application/json", 400),
        (b'{"\\udc00": 1}', "application/json", 400),
        (b'{"prompt": "\xed\xa0\x80"}', "application/json", 400),
        (b'{"prompt": "a", "n": ' + b"9" * 4299 + b"}", "application/json", 400),
        (b" " * 2**21, "application/json", 413),
    ]:
        refused = client.post("/v1/completions", content=content, headers={"Content-Type": kind})
        assert (refused.status_code, list(refused.json())) == (status, ["error"])


def test_of_a_long_value_a_refusal_tells_the_ends_and_the_remedy(server):
    for body in ({"prompt": "a", "temperature": "hot" * 100_000}, {"prompt": "a", "a" * 300_000: 1}):
        message = server.client.post("/v1/completions", json=body).json()["error"]["message"]
        assert len(message) < 1010 and " … " in message
    assert message.endswith("weights")


def test_a_letter_of_two_halves_is_read(server):
    content = b'{"prompt": "\\ud83d\\ude00"}'
    answer = server.client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


def test_more_answers_than_are_ever_let_in_are_refused_before_their_prompts_are_tokenized(lm, monkeypatch):
    reader = RequestReader(lm, "tiny", DECODING, 100, 12)
    monkeypatch.setattr(request_body, "tokenize", lambda *_: 1 / 0)
    monkeypatch.setattr(request_body, "encode_messages", lambda *_: 1 / 0)
    with pytest.raises(Refusal, match="20 answers are more than the 12 that are let in at once: ask for fewer"):
        reader.completion({"prompt": ["a"] * 10, "n": 2})
    with pytest.raises(Refusal, match="13 answers are more than the 12"):
        reader.chat({"messages": QUESTION, "n": 13})


def test_a_stop_string_that_is_a_special_token_is_found_without_the_vocabulary(lm, monkeypatch):
    reader = RequestReader(lm, "tiny", DECODING, 100, 12)
    monkeypatch.setattr(type(lm.tokenizer), "get_vocab", lambda _: 1 / 0)
    special = lm.tokenizer.all_special_tokens[0]
    asked = reader.completion({"prompt": "a", "stop": [special, "a"]})
    assert lm.tokenizer.convert_tokens_to_ids(special) in asked.decoding.stop_token_ids


def test_a_chunk_of_a_long_answer_costs_no_more_than_its_block(lm):
    """What it holds is the block's, and the lists of the answer grow in place."""
    reader = RequestReader(lm, "tiny", DECODING, 100, 12)
    asked = reader.completion({"prompt": "a", "stream": True, "logprobs": 0})
    text = GrowingText(lm.tokenizer, (), (), 10_000)
    state = AnswerState(0, text, Trajectory(asked.prompts[0], [], []))
    writer = ResponseWriter(lm.tokenizer, "tiny", asked, is_chat=False)
    token_ids = state.trajectory.token_ids
    for told in range(0, 40, 4):
        state.add(NewBlock(0, 0, [20, 30, 40, 50], [1, 2, 3, 4], [-0.5] * 4, told, told, 0, None))
        [choice] = writer.chunk(state, told)["choices"]
        assert choice["trajectory"]["token_ids"] == [20, 30, 40, 50] and state.trajectory.token_ids is token_ids
        assert len(choice["logprobs"]["tokens"]) == 4
    assert token_ids == [20, 30, 40, 50] * 10


def test_the_model_is_told_with_its_length_and_the_version_of_its_weights(server):
    [card] = server.client.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"], card["weights_version"]) == ("tiny", 128, 0)
    assert server.client.get("/v1/models/tiny").json() == card


# Many at once, too many, and those that leave


def in_background(function, *arguments, **options):
    pool = ThreadPoolExecutor(1)
    return pool.submit(function, *arguments, **options)


def test_whoever_finds_the_queue_full_is_told_when_to_ask_again(lm):
    with served(lm, max_batch=1, max_queue=1) as server:
        server.gate.shut()
        waiting = [in_background(server.client.post, "/v1/completions", json={"prompt": PROMPTS[0]}) for _ in range(2)]
        wait_until(lambda: server.service.open_answers == 2)
        for stream in (False, True):
            refused = server.client.post("/v1/completions", json={"prompt": PROMPTS[0], "stream": stream})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert "2 answers of at most 2 are under way or wait: ask again in" in refused.json()["error"]["message"]
        server.gate.open.set()
        assert [future.result().status_code for future in waiting] == [200, 200]
        assert server.client.post("/v1/completions", json={"prompt": PROMPTS[0]}).status_code == 200


def test_a_request_that_takes_too_long_is_given_up(lm):
    with served(lm, timeout=0.2) as server:
        server.gate.shut()
        response = server.client.post("/v1/completions", json={"prompt": PROMPTS[0]})
        assert response.status_code == 504 and "takes longer than 0.2 s" in response.json()["error"]["message"]
        server.gate.open.set()
        wait_until(lambda: not server.engine.running)
        assert 'dirl_dropped_answers_total{reason="timeout"} 1.0' in server.client.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_client_that_hung_up_asked_for_is_dropped(lm, stream):
    with listening(lm) as (address, server, _):
        server.gate.shut()
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 100, "n": 2, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: len(server.engine.running) == 2)
        wait_until(lambda: server.service.open_answers == 0)
        server.gate.open.set()
        wait_until(lambda: not server.engine.running)
        assert server.engine.forwards < 10
        assert 'reason="hung_up"} 2.0' in server.service.metrics.text().decode()


def test_what_is_under_way_when_a_server_stops_is_finished_and_the_rest_given_back(lm):
    with listening(lm, max_batch=1) as (address, server, uvicorn_server):
        server.gate.shut()

        def ask() -> httpx.Response:
            headers = {"Authorization": f"Bearer {KEY}"}
            return httpx.post(f"{address}/v1/completions", json={"prompt": PROMPTS[0]}, headers=headers, timeout=60)

        running = in_background(ask)
        wait_until(lambda: server.engine.running)
        waiting = in_background(ask)
        wait_until(lambda: server.service.open_answers == 2)
        uvicorn_server.ask_to_stop()
        wait_until(lambda: server.engine.orders.qsize() == 2)  # the second request, and to refuse what waits
        server.gate.open.set()
        assert running.result().status_code == 200
        assert waiting.result().status_code == 503
        with pytest.raises(httpx.TransportError):  # no connection, or one that is closed at once
            wait_until(lambda: not ask())


def test_waiting_answers_are_given_back_at_once_and_running_ones_after_the_grace(lm):
    with served(lm, max_batch=1, grace=0.0) as server:
        server.gate.shut()
        asked = {"prompt": PROMPTS[0], "max_tokens": 100}
        first = in_background(server.client.post, "/v1/completions", json=asked)
        wait_until(lambda: server.engine.running)
        second = in_background(server.client.post, "/v1/completions", json=asked)
        wait_until(lambda: server.service.open_answers == 2)
        server.client.portal.call(begin_stop, server.service)
        server.gate.open.set()
        for response in (first.result(), second.result()):
            assert response.status_code == 503
            assert response.json()["error"]["message"] == "the server is stopping: ask again when it is back"
        assert server.client.post("/v1/completions", json=asked).status_code == 503
        assert server.client.get("/health").json()["status"] == "stopping"


async def begin_stop(service):
    service.begin_stop()


# Sleep, and other weights


def test_asleep_it_answers_nothing_and_awake_the_same_again(lm):
    with served(lm) as server:
        asked = {"prompt": PROMPTS[0], **WARM}
        before = server.client.post("/v1/completions", json=asked).json()["choices"]
        assert server.client.post("/sleep").json() == {"status": "asleep"}
        refused = server.client.post("/v1/completions", json=asked)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the server is asleep: POST /wake first"
        assert server.client.get("/health").status_code == 503
        assert server.client.post("/wake").status_code == 200
        assert server.client.post("/v1/completions", json=asked).json()["choices"] == before


def test_weights_change_between_answers_and_never_within_one(tmp_path):
    old, new = speaking_lm(0), speaking_lm(1)
    new.save(tmp_path / "new")
    decoding = lm_decoding(old)
    [[of_old]], [[of_new]] = (NativeSampler(one).sample([PROMPTS[0]], 1, decoding) for one in (old, new))
    assert of_old.token_ids != of_new.token_ids
    with served(old, max_batch=1) as server:
        asked = {"prompt": PROMPTS[0], **WARM}
        server.gate.shut()
        first = in_background(server.client.post, "/v1/completions", json=asked)
        wait_until(lambda: server.engine.running)
        update = in_background(server.client.post, "/update_weights", json={"path": str(tmp_path / "new")})
        wait_until(lambda: server.engine.when_idle or not server.engine.orders.empty())
        second = in_background(server.client.post, "/v1/completions", json=asked)
        wait_until(lambda: server.service.open_answers == 2)
        server.gate.open.set()
        for future, expected, version in ((first, of_old, 0), (second, of_new, 1)):
            [choice] = future.result().json()["choices"]
            same(choice["trajectory"], expected)
            assert choice["trajectory"]["weights_version"] == version
        assert update.result().json() == {"weights_version": 1}
        later = server.client.post("/update_weights", json={"path": str(tmp_path / "new"), "version": 40})
        assert later.json() == {"weights_version": 40}


def test_weights_that_a_request_names_answer_it_or_nothing_does(tmp_path):
    old, new = speaking_lm(0), speaking_lm(1)
    path, weights = write_weights(tmp_path, new.model, new.model.named_parameters(), 5)
    named = {"version": 5, "sha256": weights.sha256}
    asked = {"prompt": PROMPTS[0], **WARM}
    with served(old, max_batch=1) as server:
        refused = server.client.post("/v1/completions", json={**asked, "weights": named})
        assert (refused.status_code, refused.json()["error"]["type"]) == (409, "conflict_error")
        assert "asked of version 5, and other weights answer, of version 0" in refused.json()["error"]["message"]

        # What waits when they come is of the old ones, as it says, and is given back.
        server.gate.shut()
        first = in_background(server.client.post, "/v1/completions", json=asked)
        wait_until(lambda: server.engine.running)
        of_old = {**asked, "weights": {"version": 0, "sha256": None}}
        second = in_background(server.client.post, "/v1/completions", json=of_old)
        wait_until(lambda: server.engine.waiting or not server.engine.orders.empty())
        update = in_background(server.client.post, "/update_weights", json={"path": str(path), **named})
        wait_until(lambda: server.engine.when_idle or server.engine.orders.qsize() > 1)
        server.gate.open.set()
        assert first.result().json()["choices"][0]["trajectory"]["weights_version"] == 0
        assert update.result().json() == {"weights_version": 5}
        assert second.result().status_code == 409

        told = server.client.get("/health").json()
        assert (told["weights_version"], told["weights_sha256"]) == (5, weights.sha256)
        [choice] = server.client.post("/v1/completions", json={**asked, "weights": named}).json()["choices"]
        [[expected]] = NativeSampler(new).sample([PROMPTS[0]], 1, lm_decoding(new))
        same({**choice["trajectory"], "weights_version": 0}, expected)


def test_weights_that_a_server_has_already_are_not_read_again(tmp_path, monkeypatch):
    lm, new = speaking_lm(0), speaking_lm(1)
    path, weights = write_weights(tmp_path, new.model, new.model.named_parameters(), 5)
    pushed = {"path": str(path), "version": 5, "sha256": weights.sha256}
    reads = []
    monkeypatch.setattr(routes, "read_weights", lambda *of: reads.append(of) or stored_weights.read_weights(*of))
    with served(lm) as server:
        for _ in range(3):
            assert server.client.post("/update_weights", json=pushed).json() == {"weights_version": 5}
        assert len(reads) == 1
        assert server.client.post("/update_weights", json={"path": str(path), "version": 5}).status_code == 200
        assert len(reads) == 2  # nobody says what they are


def test_weights_that_are_not_what_their_sum_says_are_refused_and_the_old_ones_stay(lm, tmp_path):
    new = speaking_lm(1)
    path, weights = write_weights(tmp_path, new.model, new.model.named_parameters(), 5)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with served(lm) as server:
        before = server.client.post("/v1/completions", json={"prompt": PROMPTS[0], **WARM}).json()["choices"]
        for sha256, sentence in (
            (weights.sha256, "is not what its SHA-256 says"),
            ("f", "must be 64 hexadecimal digits"),
        ):
            body = {"path": str(path), "version": 5, "sha256": sha256}
            response = server.client.post("/update_weights", json=body)
            assert response.status_code == 400 and sentence in response.json()["error"]["message"]
        assert server.client.get("/health").json()["weights_version"] == 0
        assert server.client.post("/v1/completions", json={"prompt": PROMPTS[0], **WARM}).json()["choices"] == before


def test_the_answers_from_a_sample_index_on_are_those_of_all(server):
    asked = {"prompt": [PROMPTS[0], PROMPTS[1]], **WARM}
    of_all = server.client.post("/v1/completions", json={**asked, "n": 4}).json()["choices"]
    later = server.client.post("/v1/completions", json={**asked, "first": 2, "n": 2}).json()["choices"]
    assert [choice["index"] for choice in later] == [0, 1, 2, 3]
    for choice, same_choice in zip(later, [*of_all[2:4], *of_all[6:8]], strict=True):
        assert choice["trajectory"]["token_ids"] == same_choice["trajectory"]["token_ids"]


def test_a_seed_may_be_as_long_as_those_that_a_run_derives(lm, server):
    seed = 2**63 - 1
    [choice] = server.client.post("/v1/completions", json={"prompt": PROMPTS[0], **WARM, "seed": seed}).json()[
        "choices"
    ]
    [(_, _, expected)] = NativeSampler(lm).stream([PROMPTS[0]], 1, lm_decoding(lm), seeds=[seed])
    same(choice["trajectory"], expected)


def lm_decoding(lm):
    return lm.decoding(replace(DECODING, max_new_tokens=12))


def test_weights_of_another_model_are_refused_and_the_old_ones_stay(lm, tmp_path):
    lm.save(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if weights[key].ndim == 2)

    def refusal(server, changed: dict) -> str:
        save_file(changed, file, {"format": "pt"})
        response = server.client.post("/update_weights", json={"path": str(tmp_path / "model")})
        assert response.status_code == 400
        return response.json()["error"]["message"]

    with served(lm) as server:
        before = server.client.post("/v1/completions", json={"prompt": PROMPTS[0], **WARM}).json()["choices"]
        lacking = {key: value for key, value in weights.items() if key != name}
        assert "lacks 1 tensor of the model that is served" in refusal(server, lacking)
        assert "with shape (2, 2), and the model" in refusal(server, weights | {name: torch.zeros(2, 2)})
        assert "holds nan or inf in" in refusal(server, weights | {name: weights[name] * torch.nan})
        for body, sentence in [
            ({"path": "a\0b"}, "path must be a directory"),
            ({"path": "nowhere"}, "nowhere is not a directory"),
            ({"path": str(tmp_path)}, "holds no model.safetensors"),
            ({}, "path must be a directory"),
            ({"path": "a", "versoin": 1}, "versoin: no such field"),
            ({"path": "a", "version": -1}, "version=-1: give a whole number of at least 0"),
        ]:
            response = server.client.post("/update_weights", json=body)
            assert response.status_code == 400 and sentence in response.json()["error"]["message"]
        assert server.client.post("/v1/completions", json={"prompt": PROMPTS[0], **WARM}).json()["choices"] == before


def test_what_the_engine_cannot_survive_ends_the_server_and_nobody_is_left_waiting(lm, monkeypatch):
    with served(lm) as server:
        monkeypatch.setattr(server.engine.batch, "step", lambda: 1 / 0)
        response = server.client.post("/v1/completions", json={"prompt": PROMPTS[0]})
        assert response.status_code == 503 and "the engine has failed" in response.json()["error"]["message"]
        assert server.client.get("/health").json()["status"] == "failed"
        with pytest.raises(ZeroDivisionError):
            server.engine.ended.result(10)
        for path, body in [("/v1/completions", {"prompt": PROMPTS[0]}), ("/sleep", {}), ("/wake", {})]:
            later = server.client.post(path, json=body)
            assert later.status_code == 503 and "the engine has failed" in later.json()["error"]["message"]


def test_what_the_server_itself_lacks_is_no_fault_of_the_request(lm, tmp_path, monkeypatch):
    """Waking and new weights open a batch, for which there may be no memory left."""
    lm.save(tmp_path / "model")

    def short_of_memory(length):
        raise DirlError("keys and values take more than there is: lower serve.max_length")

    with served(lm) as server:
        monkeypatch.setattr(server.engine.sampler, "open_batch", short_of_memory)
        for path, body in [("/update_weights", {"path": str(tmp_path / "model")}), ("/wake", {})]:
            response = server.client.post(path, json=body)
            assert response.status_code == 503 and "lower serve.max_length" in response.json()["error"]["message"]
        monkeypatch.undo()
        assert server.client.post("/wake").json() == {"status": "ok", "weights_version": 1}


# What is counted


def test_metrics_count_answers_tokens_and_refusals(lm):
    with served(lm) as server:
        body = server.client.post("/v1/completions", json={"prompt": PROMPTS[0], **WARM}).json()
        server.client.post("/v1/completions", json={"prompt": "a", "n": 0})
        text = server.client.get("/metrics").text
    [choice] = body["choices"]
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines[f'dirl_answers_total{{finish_reason="{choice["finish_reason"]}"}}']) == 1
    assert float(lines["dirl_tokens_total"]) == len(choice["trajectory"]["token_ids"])
    assert float(lines["dirl_prompt_tokens_total"]) == 3
    assert float(lines["dirl_engine_steps"]) == choice["trajectory"]["forwards"]
    assert float(lines['dirl_refused_requests_total{status="400"}']) == 1
    assert float(lines["dirl_answer_seconds_count"]) == float(lines["dirl_first_block_seconds_count"]) == 1
    assert float(lines["dirl_running_answers"]) == float(lines["dirl_waiting_answers"]) == 0


# Other people's clients


def test_openais_client_asks_and_streams(lm):
    openai = pytest.importorskip("openai", reason="openai is not installed: make install brings it")
    [[one]] = NativeSampler(lm).sample([encode_messages(lm.tokenizer, QUESTION)], 1, lm.decoding(DECODING))
    with listening(lm) as (address, _, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        options = {"model": "tiny", "messages": QUESTION, "temperature": 1.0, "seed": 7, "max_tokens": 12}
        whole = client.chat.completions.create(**options, extra_body={"threshold": 0.9})
        same(whole.choices[0].trajectory, one)
        chunks = list(client.chat.completions.create(**options, stream=True))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
        text = client.completions.create(model="tiny", prompt="How many", max_tokens=8, seed=1)
        assert text.choices[0].finish_reason in ("stop", "length")
        for key, prompt, kind in [("wrong", "a", openai.AuthenticationError), (KEY, "", openai.BadRequestError)]:
            with pytest.raises(kind):
                client.with_options(api_key=key).completions.create(model="tiny", prompt=prompt or [], max_tokens=8)
        with pytest.raises(openai.NotFoundError, match="no model is called gpt here: choose one of tiny"):
            client.completions.create(model="gpt", prompt="a")


@pytest.mark.slow
def test_lm_evals_local_completions_gets_the_texts_of_its_requests(lm, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: make test installs it")
    for package in ("aiohttp", "tenacity"):
        pytest.importorskip(package, reason=f"lm-eval's API models want {package}: pip install 'lm-eval[api]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with listening(lm) as (address, _, _):
        model = LocalCompletionsAPI(
            base_url=f"{address}/v1/completions", model="tiny", tokenizer_backend=None, num_concurrent=2, max_retries=1
        )
        settings = {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0.0}
        contexts = ["How many", "Tom has"]
        requests = [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(contexts)]
        texts = model.generate_until(requests)
    decoding = lm.decoding(Decoding(max_new_tokens=8))
    for request, text in zip(requests, texts, strict=True):
        ids = lm.tokenizer(request.args[0], add_special_tokens=False)["input_ids"]
        [[one]] = NativeSampler(lm).sample([ids], 1, decoding)
        assert text == answer_text(lm.tokenizer, one.completion_ids[:8])


def test_two_engines_at_once_do_not_know_of_each_other(lm):
    before = threading.active_count()
    with served(lm) as first, served(speaking_lm(1)) as second:
        asked = {"prompt": PROMPTS[0], **WARM}
        answers = [one.client.post("/v1/completions", json=asked).json() for one in (first, second)]
        assert answers[0]["choices"][0]["trajectory"] != answers[1]["choices"][0]["trajectory"]
    assert threading.active_count() < before + 20


def test_a_client_that_does_not_take_what_it_asked_for_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(routes, "READ_PATIENCE", 0.05)
    ended = []

    async def blocks():
        try:
            while True:
                yield "data: {}\n\n"
        finally:
            ended.append(True)

    async def stuck(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(30)

    asyncio.run(asyncio.wait_for(routes.EventStream(blocks(), lambda: None).stream_response(stuck), 10))
    assert ended == [True]


def test_a_cancellation_that_meets_a_block_is_not_lost(server, monkeypatch):
    service = server.service
    monkeypatch.setattr(service.engine, "submit", lambda query: None)
    asked = service.reader.completion({"prompt": PROMPTS[0]})

    async def cancelled():
        open_answers = service.admit(asked)

        async def first():
            return await anext(service.answers(asked, open_answers))

        waiting = asyncio.create_task(first())
        await asyncio.sleep(0.01)
        open_answers.events.put_nowait((0, NewBlock(0, 0, [20], [1], [0.0], 1, 1, 0, None)))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(cancelled())
    assert service.open_answers == 0


def test_a_stream_counts_from_when_it_is_let_in_also_where_its_client_is_gone_before_it_begins(server):
    service = server.service
    asked = service.reader.completion({"prompt": PROMPTS[0], "n": 3, "stream": True})
    open_answers = service.admit(asked)
    assert service.open_answers == 3

    async def events():
        yield "never asked for"

    async def gone(message):
        raise OSError

    stream = routes.EventStream(events(), lambda: service.leave(open_answers))
    with pytest.raises(Exception):  # noqa: B017  # whichever Starlette makes of it
        asyncio.run(stream({"type": "http", "asgi": {"spec_version": "2.4"}}, None, gone))
    assert service.open_answers == 0
    service.leave(open_answers)
    assert service.open_answers == 0, "nothing counts down twice"


def test_a_key_may_hold_any_letter(lm):
    with served(lm, key="schlüssel") as server:
        shown = {"Authorization": "Bearer schlüssel".encode()}
        assert server.client.get("/v1/models", headers=shown).status_code == 200
        assert server.client.get("/v1/models", headers={"Authorization": b"Bearer schl"}).status_code == 401


def test_an_update_whose_client_is_gone_leaves_the_engine_as_it_is(lm):
    with served(lm) as server:
        server.gate.shut()
        first = in_background(server.client.post, "/v1/completions", json={"prompt": PROMPTS[0]})
        wait_until(lambda: server.engine.running)
        update = server.engine.update_weights(lambda lm: 1 / 0, None)
        update.cancel()
        server.gate.open.set()
        assert first.result().status_code == 200
        assert server.client.post("/v1/completions", json={"prompt": PROMPTS[0]}).status_code == 200
        assert server.engine.weights.version == 0
