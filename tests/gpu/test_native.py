"""What only a CUDA device shows of the native engine: compiled attention, graphs, and memory that comes back."""

from functools import partial

import pytest
import torch

from dirl_cli.diffusion.unmasking import BUILT_IN
from dirl_cli.models.kv_cache import bytes_per_token
from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout import forward_gpu, native, scheduler
from dirl_cli.rollout.forward_gpu import block_attention
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.scheduler import Scheduler
from dirl_cli.rollout.sequences import Unmasker
from dirl_cli.training.logprobs import trajectory_logprobs
from dirl_cli.types import Decoding
from tests.helpers.small import random_lm, small_lm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[10, 11, 12, 13], [20, 21, 22, 23, 24, 25], [30], list(range(1, 40)), [5] * 17]


def on_gpu(lm, dtype=torch.float32):
    torch.nn.Module.to(lm.model, "cuda", dtype)
    return lm


def decoding(strategy="low_confidence_dynamic", **options):
    threshold = 2.0 if strategy == "entropy_bounded" else 0.5
    defaults = {"threshold": threshold, "lowest_threshold": 0.2, "max_new_tokens": 24}
    return Decoding(strategy=strategy, **defaults | options)


def tokens(groups):
    return [(one.token_ids, one.reveal_step, one.forwards) for group in groups for one in group]


def two_best(state):
    return state.masked & (state.masked.cumsum(-1) <= 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "heads", "key_heads"), [(4, 16, 8), (4, 32, 8), (32, 32, 8), (1, 8, 8)])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_attention_is_torchs(count, block, heads, key_heads, dtype):
    torch.manual_seed(0)
    from dirl_cli.rollout.attention_triton import decode_attention

    pages = (count + 1) * 1024 // 32
    keys, values = (torch.randn(pages, 32, key_heads, 128, device="cuda", dtype=dtype) for _ in range(2))
    table = torch.randperm(pages, device="cuda").view(count + 1, -1)
    query = torch.randn(count * block, heads, 128, device="cuda", dtype=dtype)
    slots = torch.randperm(count + 1, device="cuda")[:count]
    ends = torch.randint(1, 1024 // block, (count,), device="cuda") * block
    found, expected = (
        one(query, keys, values, table, slots, ends, 128**-0.5) for one in (decode_attention, block_attention)
    )
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", [*BUILT_IN, f"{__name__}.two_best"])
def test_answers_from_graphs_are_those_of_plain_forwards(strategy, temperature):
    lm, options = on_gpu(small_lm()), decoding(strategy, temperature=temperature)
    sampler = NativeSampler(lm, 3)
    plain = NativeSampler(lm, 3, by_blocks=False).sample(PROMPTS, 4, options)
    for _ in range(3):  # as it is, captured, replayed
        found = sampler.sample(PROMPTS, 4, options)
        assert tokens(found) == tokens(plain)
        for group, others in zip(found, plain, strict=True):
            for one, other in zip(group, others, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert any(sampler.idle_forward.replay.graphs.values())


def test_answers_from_few_pages_are_those_of_plain_forwards(monkeypatch):
    lm, options, stalled = on_gpu(small_lm()), decoding("sequential", temperature=1.0), []
    plain = NativeSampler(lm, 8, by_blocks=False).sample(PROMPTS, 4, options)
    stall = Scheduler._stall
    monkeypatch.setattr(Scheduler, "_stall", lambda self, slot: (stalled.append(slot), stall(self, slot)))
    monkeypatch.setattr(forward_gpu, "PAGE", 8)
    page = 8 * bytes_per_token(lm.model.config, torch.float32)
    monkeypatch.setattr(native, "free_bytes", lambda device: 13 * page)
    sampler = NativeSampler(lm, 8, cache_share=1.0)  # twelve pages and a spare one; an answer has up to eight
    for _ in range(3):  # as it is, captured, replayed
        assert tokens(sampler.sample(PROMPTS, 4, options)) == tokens(plain)
    assert sampler.idle_forward.pages.count == 12
    assert stalled


def test_pages_take_the_share_of_free_memory_that_was_asked_for(monkeypatch):
    lm = on_gpu(small_lm())
    free = native.free_bytes(lm.device)  # others may be at work on this GPU, and take of it meanwhile
    monkeypatch.setattr(native, "free_bytes", lambda device: free)
    sampler = NativeSampler(lm, 4096, cache_share=1e-4)  # of so many that they would need more
    sampler.sample(PROMPTS * 200, 4, decoding())
    held = sum(cached.nbytes for cached in (*sampler.idle_forward.cache.keys, *sampler.idle_forward.cache.values))
    assert 0.9e-4 * free < held < 1.1e-4 * free


@pytest.mark.parametrize("confidence", ["sampled", "entropy"])
@pytest.mark.parametrize("strategy", BUILT_IN)
def test_kernels_choose_and_reveal_what_plain_operations_do(strategy, confidence, monkeypatch):
    lm, options = on_gpu(small_lm()), decoding(strategy, temperature=1.0, confidence=confidence)
    by_kernels = NativeSampler(lm, 3).sample(PROMPTS, 4, options)
    monkeypatch.setattr(scheduler, "Unmasker", partial(Unmasker, is_fused=False))
    assert tokens(by_kernels) == tokens(NativeSampler(lm, 3).sample(PROMPTS, 4, options))


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_any_kind_of_model_is_captured_in_bfloat16(kind):
    lm, options = on_gpu(random_lm(kind), torch.bfloat16), decoding("low_confidence_static", temperature=1.0)
    sampler = NativeSampler(lm, 8)
    first, second, third = (tokens(sampler.sample(PROMPTS, 4, options)) for _ in range(3))
    assert second == third
    assert any(sampler.idle_forward.replay.graphs.values())
    assert sampler.low_precision_model is None, "it shares all of its weights"
    assert sum(a == b for a, b in zip(first, second, strict=True)) >= 0.9 * len(first)


def test_in_bfloat16_only_ties_differ_from_plain_forwards():
    lm = Tiny().load("bfloat16", "cuda", "sdpa")
    options = decoding("low_confidence_static")
    found, plain = (NativeSampler(lm, 8, by).sample(PROMPTS, 1, options) for by in (True, False))
    pairs = [pair for [a], [b] in zip(found, plain, strict=True) for pair in zip(a.token_ids, b.token_ids, strict=True)]
    assert sum(a == b for a, b in pairs) >= 0.8 * len(pairs)


def test_sampler_and_trainer_agree():
    lm = Tiny().load("float32", "cuda", "sdpa")
    options = decoding(temperature=1.0, confidence="max")
    sampler = NativeSampler(lm, 4)
    for _ in range(2):
        trajectories = [one for group in sampler.sample(PROMPTS, 4, options) for one in group]
        for one, scored in zip(trajectories, trajectory_logprobs(lm, trajectories, options), strict=True):
            assert one.logprobs == pytest.approx(scored, abs=1e-4)


def test_new_weights_reach_captured_graphs():
    sampler, other = NativeSampler(on_gpu(small_lm(seed=0)), 4), on_gpu(small_lm(seed=1))
    before = [tokens(sampler.sample(PROMPTS, 2, decoding())) for _ in range(2)][-1]
    kept = sampler.idle_forward
    sampler.update_weights(other.model.named_parameters(), version=3)
    after = sampler.sample(PROMPTS, 2, decoding())
    assert sampler.idle_forward is kept
    assert tokens(after) == tokens(NativeSampler(other, 4).sample(PROMPTS, 2, decoding())) != before
    assert {one.weights_version for group in after for one in group} == {3}


def test_under_autocast_the_trainers_weights_are_narrowed_once_and_followed():
    lm = Tiny(hidden_size=512).load("float32", "cuda", "sdpa")
    sampler, options = NativeSampler(lm, 4), decoding(temperature=1.0, confidence="max")
    linear = sum(one.weight.numel() for one in lm.model.modules() if isinstance(one, torch.nn.Linear))
    with torch.autocast("cuda", torch.bfloat16):
        trajectories = [one for group in sampler.sample(PROMPTS, 2, options) for one in group]
        scored = trajectory_logprobs(lm, trajectories, options)
        narrow = [one for one in sampler.low_precision_model.parameters() if one.dtype == torch.bfloat16]
        assert sum(one.numel() for one in narrow) == linear
        assert {kept.dtype for kept in sampler.idle_forward.cache.keys} == {torch.bfloat16}
        for one, other in zip(trajectories, scored, strict=True):
            assert one.logprobs == pytest.approx(other, abs=0.1)
        sampler.sample(PROMPTS, 2, options)
    with torch.no_grad():
        for parameter in lm.model.model.layers.parameters():
            parameter.mul_(1.05)
    sampler.update_weights(lm.model.named_parameters(), version=1)  # they share storage: only the copies move
    with torch.autocast("cuda", torch.bfloat16):
        assert tokens(sampler.sample(PROMPTS, 2, options)) == tokens(NativeSampler(lm, 4).sample(PROMPTS, 2, options))


def test_sleep_gives_all_memory_back_and_answers_stay():
    lm = on_gpu(small_lm())
    NativeSampler(lm, 2).sample(PROMPTS, 1, decoding())  # what libraries keep for themselves
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    sampler = NativeSampler(lm, 64)
    awake = [tokens(sampler.sample(PROMPTS, 8, decoding())) for _ in range(3)]
    assert torch.cuda.memory_allocated() > before + 2**18
    sampler.sleep()
    assert torch.cuda.memory_allocated() <= before + 2**16
    sampler.wake()
    assert tokens(sampler.sample(PROMPTS, 8, decoding())) == awake[0] == awake[2]


def test_a_live_batch_of_several_rules_gives_the_answers_of_streams():
    """Of four strategies in one forward, unmasked side by side, and then of one, from graphs."""
    lm = on_gpu(small_lm())
    sampler = NativeSampler(lm, 12)
    rules = [decoding(strategy, temperature=1.0) for strategy in BUILT_IN]
    batch = sampler.open_batch(64)
    answers: dict[tuple[int, int], list[int]] = {}
    for i, rule in enumerate(rules):
        for sample in range(3):
            batch.add(i, sample, PROMPTS[i], rule)
            answers[i, sample] = []
    running = set(answers)
    while running:
        for block in batch.step():
            answers[block.prompt, block.sample] += block.token_ids
            if block.stop_reason:
                running.remove((block.prompt, block.sample))
    batch.close()
    for i, rule in enumerate(rules):
        [expected] = sampler.sample([PROMPTS[i]], 3, rule)
        assert [answers[i, sample] for sample in range(3)] == [one.token_ids for one in expected]
