"""Keys and values in pages: which slot has which, and that answers are the same where there are too few of them."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dirl_cli.errors import DirlError
from dirl_cli.rollout import forward_gpu, native
from dirl_cli.rollout.decoder import decoder_of
from dirl_cli.rollout.forward import EagerForward
from dirl_cli.rollout.forward_gpu import GraphForward, block_attention, run_eagerly
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.pages import PageTable
from dirl_cli.rollout.requests import make_requests
from dirl_cli.rollout.scheduler import Scheduler
from dirl_cli.rollout.sequences import SequencePart
from dirl_cli.types import Decoding
from tests.helpers.small import small_lm

PROMPTS = [[5, 6, 7], [9, 8, 7, 6], [11] * 9, list(range(1, 24)), [3], list(range(4, 22))]
HINTS = [{}, {0: 30, 1: 31, 2: 32, 3: 33}, {i: 30 + i for i in range(14)}, {2: 30, 5: 31, 6: 32, 12: 33}]


def decoding(strategy: str = "low_confidence_dynamic", **options) -> Decoding:
    threshold = 2.0 if strategy == "entropy_bounded" else 0.5
    defaults = {"threshold": threshold, "lowest_threshold": 0.2, "max_new_tokens": 30, "temperature": 1.0}
    return Decoding(strategy=strategy, **defaults | options)


# The table


def test_a_sequence_takes_pages_as_it_grows_and_gives_them_back():
    table = PageTable(slots=2, length=12, size=4, count=3)
    assert table.extend(0, 5)
    assert table.rows[0, : table.held[0]].tolist() == [0, 1]
    assert table.extend(0, 8)
    assert table.held.tolist() == [2, 0]
    assert not table.extend(1, 5)  # wants two of which one is free
    assert table.held.tolist() == [2, 0]
    table.trim(0, 4)
    assert table.extend(1, 5)
    assert table.rows[1, : table.held[1]].tolist() == [1, 2]
    table.trim(0, 0)
    table.trim(1, 0)
    assert sorted(table.free) == [0, 1, 2]


def test_pages_that_a_prompt_fills_are_shared_and_free_when_the_last_has_gone():
    table = PageTable(slots=2, length=16, size=4, count=5)
    table.extend(0, 11)
    table.share(0, 1, 11)  # two whole pages, and three tokens of another
    assert table.rows[1, : table.held[1]].tolist() == [0, 1]
    assert table.extend(1, 12)
    assert table.rows[1, 2] == 3
    table.trim(0, 0)
    assert sorted(table.free) == [2, 4]
    table.trim(1, 0)
    assert sorted(table.free) == [0, 1, 2, 3, 4]


# The scheduler, without a model


class Ledger:
    """A forward that computes nothing and keeps account of what its cache would hold.

    Raises where an answer would see what is not its own, or a page be written that another sees too.
    """

    def __init__(self, lm, slots: int, length: int, size: int, pages: int, lengths) -> None:
        self.lm = lm
        self.decoder = SimpleNamespace(head=None)
        self.lengths = lengths  # blocks of each answer, by its key
        self.pages = PageTable(slots, length, size, pages)
        self.cache = self.sequences = self
        self.content: dict[tuple[int, int], object] = {}  # of page and offset
        self.texts: dict[int, list[int]] = {}
        self.starts: dict[int, int] = {}  # by key
        self.computed: Counter[int] = Counter()  # positions, by key
        self.most = 0  # pages in use

    def open(self, slot, prompt_ids, hint) -> None:
        self.texts[slot] = prompt_ids

    def fetch(self, slots, begin, end):
        return [SequencePart([0] * n, [1] * n, [0.0] * n) for n in (end - begin).tolist()]

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        for offset in range(tokens):
            self.content[target, offset] = self.content[source, offset]

    def step(self, blocks, cached, count, unmask, reads=True):
        """Each block is full after one step; its last token is a stop token where the answer ends."""
        tokens = np.full((blocks.shape[1], self.lm.block_size), 9)
        for i, (slot, start, step, key) in enumerate(blocks.T.tolist()):
            assert step == 1
            end = start + self.lm.block_size
            assert self.pages.held[slot] * self.pages.size >= end
            prompt = self.texts[slot]

            def value(position, prompt=prompt, key=key):
                whole = len(prompt) // self.lm.block_size * self.lm.block_size
                return tuple(prompt[: position + 1]) if position < whole else (key, position)

            for position in range(end):
                page, offset = int(self.pages.rows[slot, position // self.pages.size]), position % self.pages.size
                if position >= cached[i]:
                    assert self.pages.users[page] == 1
                    self.content[page, offset] = value(position)
                assert self.content[page, offset] == value(position)
            self.computed[key] += end - int(cached[i])
            first = self.starts.setdefault(key, start)
            if (start - first) // self.lm.block_size + 1 == self.lengths[key]:
                tokens[i, -1] = 1
        held = {int(page) for row, n in zip(self.pages.rows, self.pages.held, strict=True) for page in row[:n]}
        assert held.isdisjoint(self.pages.free)
        assert len(held) + len(self.pages.free) == self.pages.count
        self.most = max(self.most, len(held))
        return tokens


@pytest.fixture
def stalled(monkeypatch) -> list[int]:
    """The slots of answers whose pages were taken for older ones."""
    slots: list[int] = []
    stall = Scheduler._stall

    def counting(scheduler, slot):
        slots.append(slot)
        stall(scheduler, slot)

    monkeypatch.setattr(Scheduler, "_stall", counting)
    return slots


def answers(forward, requests, slots):
    """All answers by prompt and sample."""
    scheduler = Scheduler(forward, slots)
    queue, found = list(requests), {}
    with torch.inference_mode():
        while queue or scheduler.running:
            while queue and scheduler.free:
                scheduler.add(queue.pop(0))
            for one in scheduler.step():
                found[one.request.prompt, one.request.sample] = one
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shifted", [False, True])
def test_every_answer_comes_to_its_end_and_sees_nothing_but_its_own_however_few_the_pages(seed, shifted):
    rng = np.random.default_rng(seed)
    lm = small_lm(2)
    lm.model.config.logit_shift = shifted
    slots, size = int(rng.integers(1, 7)), 2 * int(rng.integers(1, 5))
    prompts = [rng.integers(1, 30, rng.integers(1, 20)).tolist() for _ in range(5)]
    length = 20 + 24
    options = decoding(max_new_tokens=24, stop_token_ids=(1,))
    requests = make_requests(prompts, 4, options, None, None)
    lengths = {request.key: int(rng.integers(1, 13)) for request in requests}
    pages = -(-length // size) + int(rng.integers(0, 12))
    forward = Ledger(lm, slots, length, size, pages, lengths)
    found = answers(forward, requests, slots)
    assert len(found) == 20
    for request in requests:
        tokens = len(found[request.prompt, request.sample].part.token_ids)
        assert tokens == lengths[request.key] * 2 - len(request.prompt_ids) % 2


def test_a_group_has_the_pages_that_its_prompt_fills_once_and_computes_it_once():
    lm = small_lm(4)
    options = decoding(max_new_tokens=4, stop_token_ids=(1,))
    requests = make_requests([list(range(1, 42))], 8, options, None, None)  # ten blocks and a token
    forward = Ledger(lm, 8, 48, 16, 24, {request.key: 1 for request in requests})
    answers(forward, requests, 8)
    assert forward.most == 2 + 8  # two whole pages, and one that begins with eight tokens of it, of each answer
    assert sum(forward.computed.values()) == 44 + 7 * 4


def test_the_youngest_makes_way_and_only_its_keys_and_values_are_computed_again(stalled):
    lm = small_lm(4)
    requests = make_requests([[5] * 4, [6] * 4], 1, decoding(max_new_tokens=16, stop_token_ids=(1,)), None, None)
    forward = Ledger(lm, 2, 20, 4, 6, {request.key: 4 for request in requests})  # which want five pages each
    found = answers(forward, requests, 2)
    assert stalled == [1]
    assert [one.forwards for one in found.values()] == [4, 4]
    older, younger = (forward.computed[request.key] for request in requests)
    assert older == 8 + 3 * 8  # the prompt and a block, then a block and the one before it
    assert younger == 32 + 8  # it had three pages, and two blocks to commit in the third


# Answers of a model


def few_pages(kind: str, lm, slots: int, length: int, pages: int):
    """Pages of eight tokens."""
    if kind == "eager":
        return EagerForward(lm, decoder_of(lm.model), slots, length, 8, pages)
    return GraphForward(lm, decoder_of(lm.model), slots, length, block_attention, run_eagerly, pages)


@pytest.mark.parametrize("kind", ["eager", "graph"])
@pytest.mark.parametrize(("shifted", "pages"), [(False, 7), (False, 12), (True, 7)])  # any fits into seven alone
@pytest.mark.parametrize("strategy", ["low_confidence_dynamic", "sequential", "bounded_adaptive"])
def test_answers_from_few_pages_are_those_from_enough(kind, shifted, pages, strategy, monkeypatch, stalled):
    monkeypatch.setattr(forward_gpu, "PAGE", 8)
    lm, options, length = small_lm(), decoding(strategy, denoising_steps=2), 56
    lm.model.config.logit_shift = shifted
    hints = [[HINTS[(i + k) % len(HINTS)] for k in range(3)] for i in range(len(PROMPTS))]
    requests = make_requests(PROMPTS, 3, options, None, None, hints)
    expected = answers(EagerForward(lm, decoder_of(lm.model), 5, length), requests, 5)
    assert not stalled
    found = answers(few_pages(kind, lm, 5, length, pages), requests, 5)
    assert stalled
    for key, other in expected.items():
        one = found[key]
        assert (one.part.token_ids, one.part.reveal_step) == (other.part.token_ids, other.part.reveal_step)
        assert (one.forwards, one.stopped) == (other.forwards, other.stopped)
        assert one.part.logprobs == pytest.approx(other.part.logprobs, abs=1e-5)


@pytest.fixture
def little_memory(monkeypatch) -> None:
    """As on a GPU that has room for ten pages of eight tokens of `small_lm`, and the spare one."""
    monkeypatch.setattr(forward_gpu, "PAGE", 8)
    monkeypatch.setattr(native, "free_bytes", lambda device: 2 * 11 * 8 * 2 * 2 * 2 * 8 * 4)


@pytest.mark.usefixtures("little_memory")
def test_a_sampler_with_little_memory_gives_the_same_answers_in_blocks_that_grow_and_with_new_weights(stalled):
    sampler = NativeSampler(small_lm(), 5, by_blocks=True, cache_share=0.5)
    for block_size, seed in ((2, 0), (4, 0), (4, 1)):
        sampler.set_block_size(block_size)
        sampler.update_weights(small_lm(seed=seed).model.named_parameters(), version=seed)
        stalled.clear()
        found = sampler.sample(PROMPTS, 2, decoding())
        assert stalled
        assert sampler.idle_forward.pages.count == 10
        expected = NativeSampler(small_lm(block_size, seed), 5).sample(PROMPTS, 2, decoding())
        for group, others in zip(found, expected, strict=True):
            for one, same in zip(group, others, strict=True):
                assert (one.token_ids, one.reveal_step) == (same.token_ids, same.reveal_step)


@pytest.mark.usefixtures("little_memory")
def test_a_stream_that_is_left_leaves_nothing_behind(stalled):
    sampler = NativeSampler(small_lm(), 5, by_blocks=True, cache_share=0.5)
    expected = sampler.sample(PROMPTS, 2, decoding())
    stream = sampler.stream(PROMPTS, 2, decoding())
    next(stream)
    stream.close()
    stalled.clear()
    assert sampler.sample(PROMPTS, 2, decoding()) == expected
    assert sampler.sample(PROMPTS, 2, decoding()) == expected  # on pages that the one before left prompts in
    assert stalled


@pytest.mark.usefixtures("little_memory")
def test_an_answer_that_does_not_fit_alone_is_refused_with_what_helps():
    sampler = NativeSampler(small_lm(), 5, by_blocks=True, cache_share=0.5)
    with pytest.raises(DirlError, match=r"of an answer of 84 tokens .* lower decoding.max_new_tokens or raise rollout"):
        sampler.sample([[5]], 1, decoding(max_new_tokens=80))
    assert sampler.sample([[5]], 1, decoding(max_new_tokens=79))


def test_with_memory_to_spare_there_are_no_more_pages_than_can_be_needed(monkeypatch):
    monkeypatch.setattr(native, "free_bytes", lambda device: 10**9)
    sampler = NativeSampler(small_lm(), 5, by_blocks=True)
    sampler.sample([[5]] * 3, 1, decoding())
    assert sampler.idle_forward.pages.count == 3  # of 32 tokens, for three answers of 31
