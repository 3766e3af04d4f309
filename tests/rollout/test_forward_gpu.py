"""Forwards of blocks, as on a GPU: the answers of plain forwards, no token more than needed, nothing left behind."""

import weakref
from collections.abc import Callable, Hashable

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from dirl_cli.diffusion.layout import Coordinates
from dirl_cli.diffusion.unmasking import BUILT_IN, EXACT
from dirl_cli.models.attention import dense_mask
from dirl_cli.models.low_precision import cast_linear_weights, recast
from dirl_cli.rollout.decoder import JoinedDecoder, decoder_of
from dirl_cli.rollout.forward import EagerForward
from dirl_cli.rollout.forward_gpu import GraphForward, block_attention, bucket
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.requests import make_requests
from dirl_cli.rollout.scheduler import Scheduler
from dirl_cli.types import Decoding
from tests.helpers.small import random_lm, small_lm
from tests.rollout.test_decoder import Kernels

PROMPTS = [[5, 6, 7], [9, 8, 7, 6], [11] * 9, [3], [9, 8, 7, 6, 5, 4, 3, 2, 1, 12, 13]]


def decoding(strategy: str = "low_confidence_dynamic", **options) -> Decoding:
    threshold = 2.0 if strategy == "entropy_bounded" else 0.5
    defaults = {"threshold": threshold, "lowest_threshold": 0.2, "max_new_tokens": 14, "temperature": 1.0}
    return Decoding(strategy=strategy, **defaults | options)


def two_best(state):
    """A strategy of one's own, which asks for what only tensors of the exact size can tell."""
    places = state.masked.cumsum(-1) <= 2
    return places & (state.candidates.tokens.numel() == state.masked.sum())


def pairs(ours, theirs):
    return [pair for group, other in zip(ours, theirs, strict=True) for pair in zip(group, other, strict=True)]


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("strategy", [*BUILT_IN, f"{__name__}.two_best"])
def test_answers_are_those_of_plain_forwards(strategy, block_size):
    lm = small_lm(block_size)
    for options in ({}, {"temperature": 0.0, "denoising_steps": 2}, {"stop_token_ids": (3, 7, 36), "top_k": 9}):
        given = (PROMPTS, 3, decoding(strategy, **options))
        ours, plain = (NativeSampler(lm, 4, by_blocks).sample(*given) for by_blocks in (True, False))
        for one, other in pairs(ours, plain):
            assert (one.token_ids, one.reveal_step) == (other.token_ids, other.reveal_step)
            assert (one.forwards, one.stop_reason) == (other.forwards, other.stop_reason)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_any_kind_of_model_is_decoded_so(kind):
    lm = random_lm(kind)
    ours, plain = (NativeSampler(lm, 4, by_blocks).sample(PROMPTS, 2, decoding()) for by_blocks in (True, False))
    assert [one.token_ids for one, _ in pairs(ours, plain)] == [other.token_ids for _, other in pairs(ours, plain)]


class Tape:
    """Replays as a graph does: a size is always done by the work that was first given for it."""

    def __init__(self) -> None:
        self.first: dict[Hashable, Callable[[], None]] = {}
        self.sizes: list[Hashable] = []

    def __call__(self, size: Hashable, work: Callable[[], None]) -> None:
        self.sizes.append(size)
        self.first.setdefault(size, work)()


def answers(forward: GraphForward, options: Decoding, prompts=PROMPTS, n: int = 3, slots: int = 4):
    with torch.inference_mode():
        scheduler = Scheduler(forward, slots)
        queue = make_requests(prompts, n, options, None, None)
        found = {}
        while queue or scheduler.running:
            while queue and scheduler.free:
                scheduler.add(queue.pop(0))
            for finished in scheduler.step():
                found[finished.request.prompt, finished.request.sample] = finished.part.token_ids
    return [[found[prompt, sample] for sample in range(n)] for prompt in range(len(prompts))]


def test_work_reads_all_that_changes_from_tensors_that_stay():
    lm, tape = small_lm(), Tape()
    forward = GraphForward(lm, decoder_of(lm.model), 4, 32, block_attention, tape)
    for options in (decoding(), decoding("sequential", temperature=0.0), decoding(seed=1)):
        plain = NativeSampler(lm, 4).sample(PROMPTS, 3, options)
        assert answers(forward, options) == [[one.token_ids for one in group] for group in plain]
    assert len(set(tape.sizes)) < len(tape.sizes) / 4


def test_only_blocks_that_are_denoised_or_to_be_cached_are_computed():
    tape = Tape()
    lm = small_lm()
    forward = GraphForward(lm, decoder_of(lm.model), 3, 32, block_attention, tape)
    options = decoding("low_confidence_static", denoising_steps=2, max_new_tokens=8)
    answers(forward, options, prompts=[[5] * 4, [6] * 4, [7] * 8], n=1, slots=3)
    # two forwards a block, of which the first caches what is before it: of one prompt two blocks
    assert [size for size in tape.sizes if isinstance(size, int)] == [7, 3, 6, 3]


@pytest.mark.parametrize("strategy", BUILT_IN)
@pytest.mark.parametrize("by_blocks", [False, True])
def test_the_host_reads_tokens_only_where_a_block_may_be_full(strategy, by_blocks, monkeypatch):
    kind = GraphForward if by_blocks else EagerForward
    step, reads = kind.step, []

    def noting(self, *args):
        tokens = step(self, *args)
        reads.append(tokens is not None)
        return tokens

    monkeypatch.setattr(kind, "step", noting)
    options = decoding(strategy, max_new_tokens=12, denoising_steps=3, threshold=1.0)  # 2, 1 and 1 of 4 tokens
    [[one], [other]] = NativeSampler(small_lm(), 2, by_blocks).sample([[5] * 4, [6] * 8], 1, options)
    assert len(one.token_ids) == len(other.token_ids) == 12
    if strategy in EXACT:
        assert [step for step in one.reveal_step if step == 2] == [2] * 3
        assert reads == 3 * [False, False, True]
    else:
        assert all(reads)


def test_between_what_is_replayed_a_step_makes_one_copy_and_never_asks_the_device():
    def replay(key, work):
        with _disable_current_modes():
            work()

    lm = small_lm()
    forward = GraphForward(lm, decoder_of(lm.model), 3, 32, block_attention, replay)
    options = decoding("low_confidence_dynamic", max_new_tokens=8, temperature=1.0)
    with torch.no_grad():  # in inference mode operations that are made of others count, too
        scheduler = Scheduler(forward, 3)
        for request in make_requests(PROMPTS[:3], 1, options, None, None):
            scheduler.add(request)
        with Kernels() as operations:
            for _ in range(20):
                operations.names.clear()
                has_newcomers, running = bool(forward.sequences.opened), len(scheduler.running)
                changes_pages = forward.pages.changed or has_newcomers
                list(scheduler.step())
                has_finished = len(scheduler.running) < running
                asks = {"_local_scalar_dense", "nonzero", "masked_select", "unique"}
                assert not asks & operations.names.keys()
                if not (has_newcomers or changes_pages or has_finished):
                    assert operations.names == {"copy_": 1}
                if not scheduler.running:
                    break
    assert not scheduler.running


@pytest.mark.parametrize("by_blocks", [False, True])
def test_a_prompt_is_computed_once_for_all_its_answers(by_blocks, monkeypatch):
    lm, seen = small_lm(), []
    compute = JoinedDecoder.__call__

    def counting(decoder, cache, token_ids, *args):
        seen.append(token_ids.numel())
        return compute(decoder, cache, token_ids, *args)

    monkeypatch.setattr(JoinedDecoder, "__call__", counting)
    prompt = list(range(1, 42))  # ten blocks and a token
    answers = NativeSampler(lm, 3, by_blocks).sample([prompt], 6, decoding("sequential", max_new_tokens=7))[0]
    assert [one.forwards for one in answers] == [3 + 4] * 6
    padding = int(by_blocks)  # of the forward of eleven blocks
    assert sum(seen) == 4 * (10 + 6 * (3 + 1 + 4) + padding)  # each answer caches one block


def test_a_shared_prompt_gives_the_answers_of_separate_ones():
    lm, options = small_lm(), decoding()
    for by_blocks in (False, True):
        shared = NativeSampler(lm, 3, by_blocks).sample(PROMPTS, 5, options)
        for prompt, group in zip(PROMPTS, shared, strict=True):
            alone = [
                list(NativeSampler(lm, 1, by_blocks).stream([prompt], i + 1, options, first=[i])) for i in range(5)
            ]
            assert [one[0][2].token_ids for one in alone] == [one.token_ids for one in group]


@pytest.mark.parametrize("riders", [0, 28, 512])  # room for none, for one prompt, for both
def test_a_prompt_goes_in_with_its_first_block_or_if_it_is_long_before_it_in_pieces(riders, monkeypatch):
    from dirl_cli.rollout import forward_gpu

    monkeypatch.setattr(forward_gpu, "RIDERS", riders)
    lm, prompt, options = small_lm(), list(range(1, 48)), decoding()
    expected = NativeSampler(lm).sample([prompt, prompt[5:]], 2, options)
    monkeypatch.setattr(forward_gpu, "PREFILL", 8)
    found = NativeSampler(lm, by_blocks=True).sample([prompt, prompt[5:]], 2, options)
    assert [one.token_ids for one, _ in pairs(found, expected)] == [one.token_ids for _, one in pairs(found, expected)]


def test_blocks_see_their_slot_up_to_their_end_as_the_rule_says():
    torch.manual_seed(0)
    query, keys, values = torch.randn(12, 4, 8), torch.randn(2, 16, 2, 8), torch.randn(2, 16, 2, 8)
    table, slots, ends = torch.tensor([[0], [1]]), torch.tensor([1, 1, 1]), torch.tensor([4, 8, 12])
    position, zeros = torch.arange(12)[None], torch.zeros(1, 12, dtype=torch.long)
    mask = dense_mask(Coordinates(zeros, zeros, position // 4, zeros))
    seen, known = (kept[1:, :12].transpose(1, 2).repeat_interleave(2, 1) for kept in (keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], seen, known, mask, scale=0.3
    )
    torch.testing.assert_close(
        block_attention(query, keys, values, table, slots, ends, 0.3), expected[0].transpose(0, 1)
    )


def test_sizes_are_few_and_padded_little():
    sizes = [bucket(count) for count in range(1, 513)]
    assert all(count <= size <= 1.25 * count for count, size in enumerate(sizes, start=1))
    assert len(set(sizes)) < 40
    assert sizes == sorted(sizes)


def test_what_was_made_for_a_stream_serves_the_next_and_is_gone_after_a_sleep():
    sampler, options = NativeSampler(small_lm(), 4, by_blocks=True), decoding()
    first = sampler.sample(PROMPTS, 2, options)
    kept = weakref.ref(sampler.idle_forward)
    assert sampler.sample(PROMPTS, 2, options) == first
    sampler.sample([[5]], 1, options)
    assert kept() is sampler.idle_forward
    sampler.sample([[5] * 60], 1, options)  # longer than it has room for
    assert kept() is None
    last = weakref.ref(sampler.idle_forward)
    sampler.sleep()
    assert last() is None
    sampler.wake()
    assert sampler.sample(PROMPTS, 2, options) == first


def test_two_streams_at_once_do_not_disturb_each_other():
    sampler, options = NativeSampler(small_lm(), 2, by_blocks=True), decoding("sequential")
    expected = {(p, s): t.token_ids for p, s, t in sampler.stream(PROMPTS, 2, options)}
    one, other = sampler.stream(PROMPTS, 2, options), sampler.stream(PROMPTS[::-1], 2, options)
    for (p, s, t), (q, r, u) in zip(one, other, strict=True):
        assert t.token_ids == expected[p, s]
        assert u.token_ids == expected[len(PROMPTS) - 1 - q, r]


def test_new_weights_reach_what_is_kept():
    sampler, other = NativeSampler(small_lm(seed=0), by_blocks=True), small_lm(seed=1)
    sampler.sample(PROMPTS, 1, decoding())
    kept = sampler.idle_forward
    sampler.update_weights(other.model.named_parameters(), version=7)
    found = sampler.sample(PROMPTS, 1, decoding())
    assert sampler.idle_forward is kept
    assert [t.token_ids for [t] in found] == [
        t.token_ids for [t] in NativeSampler(other).sample(PROMPTS, 1, decoding())
    ]
    assert {t.weights_version for [t] in found} == {7}


# Fewer bits


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_a_narrowed_model_is_what_autocast_makes_of_it(kind):
    model, ids = random_lm(kind).model, torch.arange(1, 13)[None]
    twin = cast_linear_weights(model, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(twin(ids).logits, model(ids).logits)
    assert model.lm_head.weight.dtype == torch.float32
    assert {twin.lm_head.weight.dtype, twin.model.layers[0].self_attn.o_proj.weight.dtype} == {torch.bfloat16}
    assert twin.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert twin.model.norm.weight is model.model.norm.weight


def test_a_narrowed_model_takes_new_weights_in_place():
    model, other = random_lm("tied").model, small_lm(seed=1).model
    twin = cast_linear_weights(model, torch.bfloat16)
    weight = twin.model.layers[1].self_attn.q_proj.weight
    before, address = weight.clone(), weight.data_ptr()
    with torch.no_grad():
        for own, new in zip(model.model.layers.parameters(), other.model.layers.parameters(), strict=True):
            own.copy_(new)
    recast(twin, model)
    assert weight.data_ptr() == address
    assert not torch.equal(weight, before)
    assert torch.equal(weight, other.model.layers[1].self_attn.q_proj.weight.bfloat16())


def test_under_autocast_linear_layers_and_the_cache_are_narrow_and_new_weights_arrive():
    sampler, other = NativeSampler(small_lm(), by_blocks=True), small_lm(seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        plain = NativeSampler(small_lm()).sample(PROMPTS, 1, decoding("sequential"))
        found = sampler.sample(PROMPTS, 1, decoding("sequential"))
        assert {kept.dtype for kept in (*sampler.idle_forward.cache.keys, *sampler.idle_forward.cache.values)} == {
            torch.bfloat16
        }
        first = [(a.logprobs[0], b.logprobs[0]) for [a], [b] in zip(found, plain, strict=True)]
        assert all(a == pytest.approx(b, abs=0.05) for a, b in first)
    sampler.update_weights(other.model.named_parameters(), version=1)
    kept = sampler.idle_forward
    with torch.autocast("cpu", torch.bfloat16):
        again = sampler.sample(PROMPTS, 1, decoding("sequential"))
        fresh = NativeSampler(other, by_blocks=True).sample(PROMPTS, 1, decoding("sequential"))
    assert sampler.idle_forward is kept
    narrow = weakref.ref(sampler.low_precision_model)
    del kept
    sampler.sleep()
    assert narrow() is None
    assert [t.token_ids for [t] in again] == [t.token_ids for [t] in fresh] != [t.token_ids for [t] in found]


def test_a_model_in_the_dtype_of_autocast_is_sampled_as_it_is():
    lm = small_lm()
    lm.model.bfloat16()
    sampler = NativeSampler(lm, by_blocks=True)
    with torch.autocast("cpu", torch.bfloat16):
        sampler.sample(PROMPTS, 1, decoding())
    assert sampler.low_precision_model is None
    assert sampler.idle_forward.lm.model is lm.model
