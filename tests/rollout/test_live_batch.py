"""A batch that answers join and leave between forwards: each is the sampler's own, whatever else is under way."""

import numpy as np
import pytest
import torch

from dirl_cli.errors import DirlError
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.sequences import SequenceState
from dirl_cli.types import Decoding, Trajectory
from tests.helpers.small import small_lm

PROMPTS = [[5, 6, 7], [9, 8, 7, 6], [11] * 9, [3]]
DECODINGS = [
    Decoding(temperature=1.0, threshold=0.5, max_new_tokens=14),
    Decoding(strategy="sequential", temperature=0.7, top_k=5, denoising_steps=2, max_new_tokens=9, seed=1),
    Decoding(strategy="low_confidence_static", temperature=1.0, denoising_steps=4, max_new_tokens=20),
    Decoding(strategy="entropy_bounded", threshold=2.0, temperature=1.0, max_new_tokens=8, stop_token_ids=(3, 9)),
    Decoding(strategy="sequential", temperature=1.0, denoising_steps=3, max_new_tokens=12, stop_token_ids=(7,)),
    Decoding(
        strategy="bounded_adaptive", threshold=0.9, lowest_threshold=0.3, temperature=1.0, max_new_tokens=12, seed=3
    ),
    Decoding(threshold=0.5, threshold_by_step=-0.2, threshold_by_position=0.1, temperature=1.0, max_new_tokens=12),
]


def trajectories(blocks, prompts, decodings) -> dict[tuple[int, int], Trajectory]:
    """What some blocks make together, of answers that are over."""
    grown = {}
    for block in blocks:
        key = block.prompt, block.sample
        before = grown.get(key)
        lists = {}
        for name in ("token_ids", "reveal_step", "logprobs"):
            lists[name] = (getattr(before, name) if before else []) + getattr(block, name)
        grown[key] = Trajectory(
            prompt_ids=prompts[block.prompt],
            **lists,
            stop_reason=block.stop_reason or "length",
            denoise_forwards=block.denoise_forwards,
            forwards=block.forwards,
            weights_version=block.weights_version,
            stop_token_ids=decodings[block.prompt].stop_token_ids,
            block_size=4,
        )
    over = {(block.prompt, block.sample) for block in blocks if block.stop_reason}
    return {key: trajectory for key, trajectory in grown.items() if key in over}


def same(one: Trajectory, other: Trajectory) -> None:
    names = ("prompt_ids", "token_ids", "reveal_step", "stop_reason", "forwards", "denoise_forwards", "stop_token_ids")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_answers_that_join_and_leave_at_any_time_are_those_of_a_stream(by_blocks, seed):
    """Of several decodings at once; some leave early, and a slot that was left is as good as new."""
    rng = np.random.default_rng(seed)
    lm = small_lm()
    sampler = NativeSampler(lm, 4, by_blocks=by_blocks)
    decodings = [DECODINGS[i % len(DECODINGS)] for i in range(12)]
    prompts = [PROMPTS[i % 4] for i in range(12)]
    batch = sampler.open_batch(64)
    queue = [(i, sample) for i in range(12) for sample in range(2)]
    running, left, blocks = set(), set(), []
    while queue or running:
        while queue and batch.has_room(decodings[queue[0][0]]) and rng.random() < 0.7:
            i, sample = queue.pop(0)
            batch.add(i, sample, prompts[i], decodings[i])
            running.add((i, sample))
        if running and rng.random() < 0.1:
            gone = sorted(running)[rng.integers(len(running))]
            batch.remove(*gone)
            running.remove(gone)
            left.add(gone)
        news = batch.step() if running else []
        assert {(block.prompt, block.sample) for block in news} <= running
        running -= {(block.prompt, block.sample) for block in news if block.stop_reason}
        blocks += news
    batch.close()

    ended = trajectories(blocks, prompts, decodings)
    assert ended.keys() | left == {(i, sample) for i in range(12) for sample in range(2)} and left
    for (i, sample), trajectory in ended.items():
        [answers] = NativeSampler(lm, 4, by_blocks=by_blocks).sample([prompts[i]], 2, decodings[i])
        same(trajectory, answers[sample])


def test_blocks_come_as_they_are_full_and_the_last_says_why_it_is():
    sampler = NativeSampler(small_lm(), 2)
    decoding = Decoding(strategy="sequential", denoising_steps=2, max_new_tokens=9)
    batch = sampler.open_batch(64)
    batch.add(7, 3, [5, 6, 7], decoding)
    news = [batch.step() for _ in range(5)]
    assert [[len(block.token_ids) for block in blocks] for blocks in news] == [[1], [], [4], [], [4]]
    blocks = [block for blocks in news for block in blocks]
    assert [block.forwards for block in blocks] == [1, 3, 5]
    assert [block.stop_reason for block in blocks] == [None, None, "length"]


def test_a_model_that_predicts_from_the_token_before_wants_one_in_the_prompt():
    """The state of another answer's last token would stand in for it."""
    lm = small_lm()
    lm.model.config.logit_shift = True
    sampler = NativeSampler(lm, 2)
    with pytest.raises(DirlError, match="a prompt holds no token, and this model predicts each from the one before"):
        sampler.sample([[5], []], 1, Decoding(max_new_tokens=4))
    with pytest.raises(DirlError, match="a prompt holds no token"):
        sampler.open_batch(16).add(0, 0, [], Decoding(max_new_tokens=4))


def test_of_a_full_block_its_own_tokens_alone_are_fetched(monkeypatch):
    """Of answers of any length, and of one that ends no more than of the others."""
    fetch, sizes = SequenceState.fetch, []

    def noting(self, slots, begin, end):
        parts = fetch(self, slots, begin, end)
        sizes.append([len(part.token_ids) for part in parts])
        return parts

    monkeypatch.setattr(SequenceState, "fetch", noting)
    batch = NativeSampler(small_lm(), 2).open_batch(64)
    for number, prompt_ids in enumerate([[5, 6, 7], [8] * 8]):
        batch.add(number, 0, prompt_ids, Decoding(strategy="sequential", denoising_steps=1, max_new_tokens=9))
    news = [block for _ in range(3) for block in batch.step()]
    assert sizes == [[1, 4], [4, 4], [4, 4]]
    assert [block.stop_reason for block in news] == [None] * 4 + ["length"] * 2


def test_what_is_fetched_of_some_slots_ends_where_each_says():
    sequences = SequenceState(small_lm(), 3, 8)
    sequences.tokens = torch.arange(24).reshape(3, 8)
    parts = sequences.fetch(np.array([2, 0]), np.array([5, 1]), np.array([8, 7]))
    assert [part.token_ids for part in parts] == [[21, 22, 23], [1, 2, 3, 4, 5, 6]]


def test_an_answer_has_no_more_room_than_the_batch():
    batch = NativeSampler(small_lm(), 2).open_batch(16)
    batch.add(0, 0, [5] * 10, Decoding(strategy="sequential", denoising_steps=1, max_new_tokens=100))
    blocks = [block for _ in range(2) for block in batch.step()]
    assert [len(block.token_ids) for block in blocks] == [2, 4] and blocks[-1].stop_reason == "length"
    with pytest.raises(DirlError, match="a prompt has 16 tokens and there is room for 15: shorten it"):
        batch.add(1, 0, [5] * 16, Decoding())


def test_rules_that_nobody_asks_for_any_more_are_forgotten():
    """A server's clients may each bring a temperature of their own."""
    batch = NativeSampler(small_lm(), 2).open_batch(16)
    for i in range(40):
        batch.add(i, 0, [5] * 4, Decoding(temperature=1 + i / 100, max_new_tokens=4, denoising_steps=1))
        while batch.scheduler.running:
            batch.step()
    assert len(batch.scheduler.unmaskers) <= 2


def test_a_cpu_has_as_many_answers_at_once_as_its_memory_has_room_for(monkeypatch):
    from dirl_cli.rollout import native

    lm = small_lm()  # two layers of two key heads of eight values, in float32: 256 bytes a token
    memory = type("Memory", (), {"available": 256 * 64 * 6})
    monkeypatch.setattr(native.psutil, "virtual_memory", lambda: memory)
    assert NativeSampler(lm, 64, cache_share=0.5).open_batch(64).slots == 3
    with pytest.raises(DirlError, match=r"lower serve.max_length or raise rollout.cache_share"):
        NativeSampler(lm, 64, cache_share=0.1).open_batch(64)
