"""Sampling with servers: the in-process sampler's answers, whatever becomes of a server meanwhile."""

import asyncio
import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest

pytest.importorskip("starlette", reason="servers want starlette: make install brings it")

from dirl_cli.errors import DirlError
from dirl_cli.models.load import SavedModel
from dirl_cli.rollout import server_pool, server_sampler
from dirl_cli.rollout.arrays import with_arrays
from dirl_cli.rollout.engines import Servers
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.sampler import Stint
from dirl_cli.rollout.server_client import ServerClient, ServerFailed
from dirl_cli.rollout.server_sampler import ServerSampler, body_of, questions_of
from dirl_cli.rollout.storage import rollout_path
from dirl_cli.serving import routes
from dirl_cli.serving.engine import Query
from dirl_cli.types import Decoding, Trajectory
from tests.helpers import rl_runs
from tests.helpers.farm import PATIENCE, PROMPTS, SEEDS, answers_of, farm, read_one_by_one
from tests.helpers.served import KEY, listening, speaking_lm, wait_until


@pytest.fixture(autouse=True)
def quick_returns(monkeypatch):
    monkeypatch.setattr(server_pool, "FIRST_PAUSE", 0.02)


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    read_one_by_one(monkeypatch)


@pytest.fixture(scope="module")
def lm():
    return speaking_lm(3)


@pytest.fixture(scope="module")
def decoding(lm):
    return lm.decoding(Decoding(temperature=1.0, max_new_tokens=12))


@pytest.fixture(scope="module")
def expected(lm, decoding):
    """The in-process sampler's answers, each alone in its batch."""
    return answers_of(NativeSampler(lm, max_batch=1), decoding)


def test_the_answers_are_the_in_process_samplers_to_the_bit(lm, decoding, expected, tmp_path):
    with farm(lm, tmp_path) as two:
        assert answers_of(two.sampler, decoding) == expected
        asked = [served.engine.forwards for served in two.servers]
        assert min(asked) > 0, "one server had nothing to do"
        assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version-000000"]


def test_in_larger_batches_log_probs_are_rounded_otherwise_and_nothing_else(lm, decoding, expected, tmp_path):
    with farm(lm, tmp_path, count=1, max_batch=4) as one:
        answers = answers_of(one.sampler, decoding)
    assert answers.keys() == expected.keys()
    for key, answer in answers.items():
        assert replace(answer, logprobs=[]) == replace(expected[key], logprobs=[])
        assert answer.logprobs == pytest.approx(expected[key].logprobs, abs=1e-5)


def test_what_a_server_owes_that_is_cut_off_comes_from_another_and_it_is_taken_back(lm, decoding, expected, tmp_path):
    with farm(lm, tmp_path) as two:
        two.servers[0].gate.shut()  # so that it owes something for sure
        stream = two.sampler.stream(PROMPTS, 3, decoding, seeds=SEEDS)
        answers = {}
        for prompt, sample, answer in stream:
            answers[prompt, sample] = answer
            two.lines[0].cut()
        assert answers == expected
        assert not two.is_up(0)
        two.servers[0].gate.open.set()
        two.lines[0].mend()
        wait_until(lambda: two.is_up(0))
        assert answers_of(two.sampler, decoding) == expected


def test_a_server_whose_engine_hangs_is_left_out(lm, decoding, expected, tmp_path):
    with farm(lm, tmp_path, patience=replace(PATIENCE, silence=0.3)) as two:
        two.sampler.update_weights(lm.model.named_parameters(), 0)
        two.servers[1].gate.shut()
        assert answers_of(two.sampler, decoding) == expected
        assert two.sampler.pool.servers[1].failure == "takes no step in 0.3 s"


def test_a_server_that_hangs_over_an_answer_does_not_hold_up_new_weights(lm, decoding, tmp_path):
    with farm(lm, tmp_path, patience=replace(PATIENCE, silence=0.3)) as two:
        two.sampler.update_weights(lm.model.named_parameters(), 0)
        hung = two.servers[1]
        hung.gate.shut()
        hung.engine.submit(Query([20, 30], range(1), decoding, lambda news: None))  # as one that nobody waits for
        wait_until(lambda: hung.engine.running)
        two.sampler.update_weights(lm.model.named_parameters(), 1)
        assert two.is_up(0) and not two.is_up(1)
        assert two.sampler.pool.servers[1].failure == "takes no step in 0.3 s"
        hung.gate.open.set()
        wait_until(lambda: two.is_up(1))
        assert hung.engine.weights == two.sampler.pool.weights


def test_a_server_that_takes_its_time_to_read_new_weights_does_not_hang(lm, tmp_path, monkeypatch):
    read_weights = routes.read_weights

    def read_slowly(*arguments):
        time.sleep(0.6)
        return read_weights(*arguments)

    monkeypatch.setattr(routes, "read_weights", read_slowly)
    with farm(lm, tmp_path, count=1, patience=replace(PATIENCE, silence=0.1)) as one:
        one.sampler.update_weights(lm.model.named_parameters(), 0)
        assert one.is_up(0) and one.sampler.pool.servers[0].failures == 0


def test_a_line_on_which_nothing_moves_is_as_good_as_cut(lm, decoding, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("dirl_cli.rollout.server_client.CONNECT", 0.3)
    with farm(lm, tmp_path, patience=replace(PATIENCE, silence=0.3)) as two:
        two.sampler.update_weights(lm.model.named_parameters(), 0)
        two.lines[0].moves.clear()
        assert answers_of(two.sampler, decoding) == expected
        assert "does not say how it is" in two.sampler.pool.servers[0].failure


def test_weights_that_somebody_else_gave_a_server_answer_nothing(lm, decoding, expected, tmp_path):
    with farm(lm, tmp_path, count=1) as one:
        assert answers_of(one.sampler, decoding) == expected
        other = speaking_lm(1)
        one.servers[0].engine.update_weights(lambda lm: dict(other.model.named_parameters()), 0).result(30)
        assert answers_of(one.sampler, decoding) == expected


def test_a_block_of_another_version_is_no_part_of_an_answer(lm, decoding, expected, tmp_path):
    with farm(lm, tmp_path) as two:
        two.sampler.update_weights(lm.model.named_parameters(), 0)
        liar = two.sampler.pool.servers[0]
        honest = liar.client.choices

        async def choices(body):
            async for choice in honest(body):
                yield {**choice, "trajectory": {**choice["trajectory"], "weights_version": 7}}

        liar.client.choices = choices
        assert answers_of(two.sampler, decoding) == expected
        assert liar.failure == "answers with version 7 of the weights"


def test_a_server_that_misses_a_push_is_left_out_until_it_has_it(lm, decoding, tmp_path):
    new = speaking_lm(4)
    of_new = {
        key: replace(answer, weights_version=1) for key, answer in answers_of(NativeSampler(new, 1), decoding).items()
    }
    with farm(lm, tmp_path) as two:
        two.sampler.update_weights(lm.model.named_parameters(), 0)
        two.lines[1].cut()
        two.sampler.update_weights(new.model.named_parameters(), 1)
        assert (two.is_up(0), two.is_up(1)) == (True, False)
        assert answers_of(two.sampler, decoding) == of_new
        assert two.servers[1].engine.weights.version == 0
        two.lines[1].mend()
        wait_until(lambda: two.is_up(1))
        assert two.servers[1].engine.weights == two.sampler.pool.weights
        assert answers_of(two.sampler, decoding) == of_new


def test_weights_that_are_damaged_on_the_way_are_taken_by_nobody(lm, decoding, tmp_path, monkeypatch):
    write_weights = server_sampler.write_weights

    def damaged(*arguments):
        path, weights = write_weights(*arguments)
        file = path / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return path, weights

    with farm(lm, tmp_path, count=1, patience=replace(PATIENCE, outage=0.5)) as one:
        one.sampler.update_weights(lm.model.named_parameters(), 0)
        before = one.servers[0].engine.weights
        monkeypatch.setattr(server_sampler, "write_weights", damaged)
        with pytest.raises(DirlError, match=r"no server has answered for 0.5 s .* is not what its SHA-256 says"):
            one.sampler.update_weights(speaking_lm(4).model.named_parameters(), 1)
        assert one.servers[0].engine.weights == before

        monkeypatch.setattr(server_sampler, "write_weights", write_weights)
        one.sampler.update_weights(lm.model.named_parameters(), 1)
        assert one.servers[0].engine.weights.version == 1


def test_where_no_server_ever_answers_it_is_told_how_long_that_is_waited_for(lm, tmp_path, capsys):
    sampler = ServerSampler(lm, ["http://127.0.0.1:9"], tmp_path, 4, replace(PATIENCE, outage=0.2), KEY)
    with pytest.raises(DirlError, match=r"no server has answered for 0.2 s"):
        sampler.update_weights(lm.model.named_parameters(), 0)
    assert "no server answers: waiting for up to 0.2 s" in capsys.readouterr().err


def test_where_no_server_answers_the_run_ends_in_a_sentence(lm, decoding, tmp_path):
    with farm(lm, tmp_path, patience=replace(PATIENCE, outage=0.3)) as two:
        two.sampler.update_weights(lm.model.named_parameters(), 0)
        stream = two.sampler.stream(PROMPTS, 3, decoding, seeds=SEEDS)
        next(stream)
        for line in two.lines:
            line.cut()
        with pytest.raises(DirlError, match=r"no server has answered for 0.3 s .*: start them again and give the same"):
            list(stream)


def test_an_outage_that_ends_in_time_costs_nothing(lm, decoding, expected, tmp_path):
    with farm(lm, tmp_path, count=1) as one:
        one.servers[0].gate.shuts_itself = True
        stream = one.sampler.stream(PROMPTS, 3, decoding, seeds=SEEDS)
        answers = [next(stream)]
        one.lines[0].cut()
        wait_until(lambda: not one.is_up(0))
        one.servers[0].gate.shuts_itself = False
        one.servers[0].gate.open.set()
        one.lines[0].mend()
        answers += stream
        assert {(prompt, sample): answer for prompt, sample, answer in answers} == expected
        assert len(answers) == len(expected)  # each once, though a whole group was asked again


def test_a_server_that_has_too_much_to_do_is_asked_again_when_it_says_so(lm, decoding, expected, tmp_path):
    with listening(speaking_lm(0), max_batch=1, max_queue=1) as (address, served, _):
        sampler = ServerSampler(lm, [address], tmp_path / "weights", 8, PATIENCE, KEY)
        sampler.update_weights(lm.model.named_parameters(), 0)
        served.gate.shut()  # until a question has found the queue full
        with ThreadPoolExecutor(1) as thread:
            answering = thread.submit(answers_of, sampler, decoding, n=1)
            wait_until(served.service.metrics.refused.labels(429)._value.get)
            served.gate.open.set()
            answers = answering.result()
        assert answers == {key: answer for key, answer in expected.items() if key[1] == 0}
        assert sampler.pool.servers[0].failures == 0


def test_a_server_that_comes_back_with_less_room_does_not_cut_answers_short(lm, decoding, tmp_path):
    with farm(lm, tmp_path, count=1) as one:
        one.servers[0].gate.shuts_itself = True
        stream = one.sampler.stream(PROMPTS, 3, decoding, seeds=SEEDS)
        next(stream)
        one.lines[0].cut()
        wait_until(lambda: not one.is_up(0))
        one.servers[0].service.reader.longest_prompt = 9
        one.servers[0].gate.open.set()
        one.lines[0].mend()
        with pytest.raises(DirlError, match="has room for 10 tokens, and a prompt and its answer may have"):
            list(stream)


def test_what_is_wrong_at_the_start_is_told_at_once(lm, tmp_path):
    wrong_key = "wants its key: give it in DIRL_SERVE_KEY"
    with farm(lm, tmp_path, key="another") as two, pytest.raises(DirlError, match=wrong_key):
        two.sampler.update_weights(lm.model.named_parameters(), 0)
    wrong_model = "serves a model whose mask_token_id is 3, and here it is 5"
    with farm(replace(lm, mask_token_id=5), tmp_path) as two, pytest.raises(DirlError, match=wrong_model):
        two.sampler.update_weights(lm.model.named_parameters(), 0)


def test_what_servers_cannot_do_is_told_and_once(lm, decoding, tmp_path, caplog):
    with farm(lm, tmp_path, count=1, max_batch=4) as one:
        for options, sentence in (({"watch": print}, "watch=true"), ({"hints": [[{0: 9}]]}, "hints want")):
            with pytest.raises(DirlError, match=sentence):
                list(one.sampler.stream(PROMPTS[:1], 1, decoding, **options))
        with pytest.raises(DirlError, match="has room for 128 tokens, and a prompt and its answer may have 203"):
            list(one.sampler.stream([PROMPTS[0]] * 3, 1, replace(decoding, max_new_tokens=200)))
        with pytest.raises(DirlError, match="refuses what it is asked: strategy=a"):
            list(one.sampler.stream(PROMPTS[:1], 1, replace(decoding, strategy="a")))
        with pytest.raises(DirlError, match="blocks of one size"):
            one.sampler.set_block_size(8)
    gc.collect()
    assert not caplog.records, "asyncio complains of errors that nobody took"


def test_what_nobody_waits_for_any_more_is_dropped_by_the_servers(lm, decoding, tmp_path):
    with farm(lm, tmp_path, count=1) as one:
        one.sampler.update_weights(lm.model.named_parameters(), 0)
        stream = one.sampler.stream(PROMPTS, 3, decoding, seeds=SEEDS)
        next(stream)
        one.servers[0].gate.shut()
        stream.close()
        wait_until(lambda: one.servers[0].service.open_answers == 0)
        one.servers[0].gate.open.set()


def test_answers_that_are_there_already_are_not_asked_for(lm, decoding, expected, tmp_path):
    with farm(lm, tmp_path, count=1) as one:
        asked = list(one.sampler.stream(PROMPTS, 3, decoding, first=[3, 1, 0], seeds=SEEDS))
    assert sorted((prompt, sample) for prompt, sample, _ in asked) == [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert all(answer.token_ids == expected[prompt, sample].token_ids for prompt, sample, answer in asked)


def beginning(answer: Trajectory, blocks: int) -> Trajectory:
    """The first blocks of an answer, as a sampler leaves it under way."""
    end = blocks * 4 - len(answer.prompt_ids) % 4
    lists = {name: getattr(answer, name)[:end] for name in ("token_ids", "reveal_step", "logprobs")}
    return replace(answer, **lists, denoise_forwards=1, forwards=1, weights_version=0)


def test_an_answer_goes_on_from_its_blocks_as_it_would_have_been_and_notes_whose_weights_drew_them(
    lm, decoding, expected, tmp_path
):
    longest = {key: answer for key, answer in expected.items() if len(answer.token_ids) > 8}
    under_way = {key: beginning(answer, 1) for key, answer in longest.items()}
    stint = Stint(len(PROMPTS), finished=set(expected) - set(longest), under_way=dict(under_way))
    with farm(lm, tmp_path, count=1) as one:
        one.sampler.update_weights(lm.model.named_parameters(), 5)
        answers = {(i, k): t for i, k, t in one.sampler.stream(PROMPTS, 3, decoding, seeds=SEEDS, stint=stint)}
    assert answers.keys() == longest.keys() and not stint.under_way
    for key, answer in answers.items():
        begun = len(under_way[key].token_ids)
        assert answer.token_ids == expected[key].token_ids
        assert answer.reveal_step == expected[key].reveal_step
        assert answer.logprobs == pytest.approx(expected[key].logprobs, abs=1e-5)
        assert answer.versions == [0] * begun + [5] * (len(answer.token_ids) - begun)
        assert answer.weights_version == 0


def test_what_a_stint_does_not_wait_for_is_left_with_the_blocks_that_have_come(lm, decoding, expected, tmp_path):
    first = Stint(1)
    with farm(lm, tmp_path, count=1, max_batch=9) as one:
        answers = {(i, k): t for i, k, t in one.sampler.stream(PROMPTS, 3, decoding, seeds=SEEDS, stint=first)}
        assert {(0, 0), (0, 1), (0, 2)} <= answers.keys()
        assert not first.under_way.keys() & answers.keys()
        for key, part in first.under_way.items():
            assert part.token_ids == expected[key].token_ids[: len(part.token_ids)]
        wait_until(lambda: one.servers[0].service.open_answers == 0)

        second = Stint(len(PROMPTS), finished=set(answers), under_way=dict(first.under_way))
        answers |= {(i, k): t for i, k, t in one.sampler.stream(PROMPTS, 3, decoding, seeds=SEEDS, stint=second)}
    assert {key: answer.token_ids for key, answer in answers.items()} == {
        key: answer.token_ids for key, answer in expected.items()
    }


def test_each_answer_that_has_begun_is_asked_for_alone_and_the_others_together():
    begun = Trajectory([1], [2, 3, 4], [1, 1, 1], [-0.5] * 3, denoise_forwards=1, forwards=1, weights_version=3)
    stint = Stint(1, finished={(0, 2)}, under_way={(0, 4): begun})
    questions = questions_of(0, [1], range(7), 9, stint)
    assert [(one.first, one.n, one.so_far) for one in questions] == [
        (0, 2, None),
        (3, 1, None),
        (4, 1, begun),
        (5, 2, None),
    ]
    block = {"token_ids": [7] * 4, "reveal_step": [1] * 4, "logprobs": [-1.0] * 4, "weights_version": 4}
    question = questions[2]
    question.parts = [block | {"denoise_forwards": 2, "forwards": 2, "stop_token_ids": [], "block_size": 4}]
    part = question.under_way[0, 4]
    assert (part.token_ids, part.versions, part.forwards) == ([2, 3, 4, 7, 7, 7, 7], [3, 3, 3, 4, 4, 4, 4], 3)
    question.answered.add(0)
    assert not question.under_way


def test_what_another_process_has_begun_can_be_asked_on():
    begun = Trajectory([1], [2, 3, 400], [1, 1, 1], [-0.5] * 3, denoise_forwards=1, forwards=1)
    [sent] = with_arrays([begun])
    [question] = questions_of(0, [1], range(1), 9, Stint(0, under_way={(0, 0): sent}))
    body = body_of(question, Decoding(max_new_tokens=8), WeightsId(3, "0" * 64), 4)
    assert json.loads(json.dumps(body))["answer_ids"] == [2, 3, 400]


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_run_that_samples_with_servers_ends_in_the_bytes_of_one_that_samples_itself(tmp_path, ahead):
    model = rl_runs.save_sharp_model(tmp_path / "model")
    words = ("steps=3", "eval_problems=2", "save_every=0", "show_every=0", "rollout.max_batch=1")
    words += (f"rl.async_rollout={ahead}",)
    rl_runs.run(rl_runs.config(model, *words), tmp_path / "own")
    with ExitStack() as stack:
        addresses = []
        for _ in range(1 if ahead > 1 else 2):  # several leave off where the clock says
            lm = SavedModel("sharp", str(model)).load("float32", "cpu", "sdpa")
            addresses.append(stack.enter_context(listening(lm, max_batch=1, key=None))[0])
        url = f"rollout.url=[{','.join(addresses)}]"
        served = ("rollout=server", url, f"rollout.directory={tmp_path}/weights")
        rl_runs.run(rl_runs.config(model, *words, *served), tmp_path / "served")

    assert rl_runs.weights(tmp_path / "served") == rl_runs.weights(tmp_path / "own")
    for step in (1, 2, 3):
        own, other = (rollout_path(tmp_path / name / "rollouts", step) for name in ("own", "served"))
        assert own.read_bytes() == other.read_bytes()
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version-000003"]


def test_who_is_asked_is_who_owes_least(lm, tmp_path):
    sampler = ServerSampler(lm, ["http://a", "http://b", "http://c"], tmp_path, 4, PATIENCE, None)
    a, b, c = sampler.pool.servers
    for server, tokens, answers in ((a, 50, 2), (b, 30, 3), (c, 0, 0)):
        server.is_up, server.tokens, server.answers = True, tokens, answers
    assert sampler.pool.least_busy(2) is c
    c.is_up = False
    assert sampler.pool.least_busy(1) is b
    assert sampler.pool.least_busy(2) is a  # b has no room
    assert sampler.pool.least_busy(3) is None
    b.answers = 0
    assert sampler.pool.least_busy(9) is b  # more than it may be asked at once, and so alone


def addressed(url: tuple[str, ...], servers: int | None = None) -> Servers:
    return Servers(url, servers, "native", "weights", 64, 60, 600, 600)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ((), "wants addresses"),
        (("a:8000",), "holds a:8000"),
        (("http://a:8000/v1",), "holds http://a:8000/v1"),
        (("http://a:99999",), "holds http://a:99999"),
        (("http://[::1",), "holds http://"),
        (("http://me:secret@a:8000",), r"^(?!.*secret).* give the key in DIRL_SERVE_KEY"),
        (("http://a:8000", "http://a:8000/"), "an address twice"),
    ],
)
def test_addresses_that_are_none_are_told_before_anything_is_loaded(url, sentence):
    with pytest.raises(DirlError, match=sentence):
        addressed(url).require()


def test_servers_are_started_by_dirl_rl_alone():
    with pytest.raises(DirlError, match=r"rollout.servers is of dirl rl: give rollout.url"):
        addressed((), servers=2).require()


@pytest.mark.parametrize("key", ["secret\n", " secret", "sec\r\nret"])
def test_a_key_that_no_header_holds_is_told_without_telling_it(key, monkeypatch):
    monkeypatch.setenv("DIRL_SERVE_KEY", key)
    with pytest.raises(DirlError, match=r"^(?!.*sec).*DIRL_SERVE_KEY.* leave that out"):
        addressed(("http://a:8000",)).require()


def test_a_server_rests_no_longer_where_new_weights_come_more_often_than_its_rest_ends(lm, tmp_path, monkeypatch):
    sampler = ServerSampler(lm, ["http://a", "http://b"], tmp_path, 4, PATIENCE, None)
    sound, failing = sampler.pool.servers
    asked = []

    async def room(client):
        return 64

    async def lacks(client, weights):
        asked.append(client)
        return False

    monkeypatch.setattr(ServerClient, "room", room)
    monkeypatch.setattr(ServerClient, "lacks", lacks)
    monkeypatch.setattr(server_pool, "FIRST_PAUSE", 0.3)

    async def updates():
        sampler.pool.leave_out(failing, ServerFailed("fell over"))
        for version in range(20):
            await sampler.pool.forget_weights()
            await sampler.pool.adopt(tmp_path, WeightsId(version, "a" * 64))
            if failing.client in asked:
                return
            await asyncio.sleep(0.05)

    asyncio.run(updates())
    assert failing.client in asked and asked.count(sound.client) > 1


def test_the_pause_before_a_server_is_asked_again_doubles(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(server_pool, "FIRST_PAUSE", 0.5)
    sampler = ServerSampler(lm, ["http://127.0.0.1:9"], tmp_path, 4, PATIENCE, None)
    [server] = sampler.pool.servers
    server.failures = 1
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 9:
            server.is_up = True

    monkeypatch.setattr(server_pool.asyncio, "sleep", sleep)
    sampler.pool._let_rest(server, ServerFailed("fell over"))
    asyncio.run(sampler.pool._bring_back(server))
    assert pauses == pytest.approx([0.5, 1, 2, 4, 8, 16, 32, 60, 60], abs=0.4)
