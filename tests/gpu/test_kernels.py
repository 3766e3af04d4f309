"""What only a CUDA device shows of the sampling kernels, the head's backward and block masks."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from dirl_cli.diffusion.layout import Rows, pack
from dirl_cli.diffusion.sampling import draw_candidates, draw_fused, draw_seed, race, temper
from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.models.attention import block_mask, dense_mask
from dirl_cli.training.logprobs import LogprobModel, linear_logprobs
from tests.helpers.answers import ANSWERS, BLOCK
from tests.helpers.small import MASK, PAD, random_lm, small_lm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARY = 151_936


def published_logits(n: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the published vocabulary, a seed a row, and the ids that are not sampled."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 3 * torch.randn(n, VOCABULARY, generator=generator, device="cuda")
    one = torch.tensor(1, device="cuda")
    seeds = draw_seed(torch.arange(n, device="cuda"), one, one)
    return logits.to(dtype), seeds, torch.arange(151_669, VOCABULARY, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_compiled_kernels_draw_what_torch_draws_on_either_device(dtype, temperature):
    logits, seeds, unsampled = published_logits(64, dtype)
    found = draw_candidates(logits, seeds, temperature, 0, 1.0, "max", unsampled)
    assert found.computed_entropy is not None  # the kernels were taken
    on_gpu = race(temper(logits, temperature, unsampled).log_softmax(-1), seeds)
    on_cpu = draw_candidates(logits.cpu(), seeds.cpu(), temperature, 0, 1.0, "max", unsampled.cpu())
    for expected in (on_gpu.cpu(), on_cpu.tokens):
        assert (found.tokens.cpu() == expected).sum() >= 63, "rounding may tip one of 64 tokens, not two"
    same = found.tokens.cpu() == on_cpu.tokens
    torch.testing.assert_close(found.logprobs.cpu()[same], on_cpu.logprobs[same], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.confidence.cpu(), on_cpu.confidence, atol=0, rtol=1e-4)  # a sum of 151 936 terms
    torch.testing.assert_close(found.entropy.cpu(), on_cpu.entropy, atol=1e-4, rtol=1e-4)


def test_compiled_kernels_take_the_largest_logit_the_left_one_on_a_tie():
    logits, _, unsampled = published_logits(64)
    logits[:, [5000, 150_000]] = 50.0
    logits[:, 151_700] = 90.0  # which is never sampled
    assert draw_candidates(logits, None, 0.0, 0, 1.0, "sampled", unsampled).tokens.tolist() == [5000] * 64


def test_drawing_takes_no_memory_of_the_logits_size():
    logits, seeds, unsampled = published_logits(256)
    draw_fused(logits, seeds, 1.0, "max", unsampled)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    draw_fused(logits, seeds, 1.0, "max", unsampled)
    assert torch.cuda.max_memory_allocated() - before < 0.02 * logits.nbytes


def test_drawing_can_be_captured_in_a_graph():
    logits, seeds, unsampled = published_logits(16)
    expected = draw_fused(logits, seeds, 1.0, "entropy", unsampled)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = draw_fused(logits, seeds, 1.0, "entropy", unsampled)
    graph.replay()
    for name in ("tokens", "logprobs", "confidence", "entropy"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    logits.copy_(logits.roll(1, 0))
    seeds.copy_(seeds.roll(1, 0))
    graph.replay()
    assert torch.equal(found.tokens, expected.tokens.roll(1, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_heads_backward_is_that_of_all_logits(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(n, 256, generator=generator, device="cuda").div_(4).requires_grad_() for n in (300, 20_000)
    )
    targets = torch.randint(2, 20_000, (300,), generator=generator, device="cuda")
    upstream = torch.randn(300, generator=generator, device="cuda")
    unsampled = torch.tensor([0, 1], device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
        logprobs, *_ = linear_logprobs(hidden, weight, targets, 0.8, unsampled, 128)
        logits = temper(hidden @ weight.T, 0.8, unsampled)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad((each * upstream).sum(), (hidden, weight)) for each in (logprobs, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < (1e-5 if dtype == torch.float32 else 0.01) * other.norm()


def test_scoring_a_published_vocabulary_holds_two_copies_of_a_chunks_logits():
    hidden = torch.randn(4000, 64, device="cuda", requires_grad=True)
    weight = torch.randn(VOCABULARY, 64, device="cuda", requires_grad=True)
    targets, none = torch.zeros(4000, dtype=torch.long, device="cuda"), torch.zeros(0, dtype=torch.long, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprobs(hidden, weight, targets, 1.0, none, 512)[0].sum().backward()
    copy = 4 * 512 * VOCABULARY
    assert torch.cuda.max_memory_allocated() - before < 2.1 * copy + 3 * weight.nbytes


def rows(repeats: int, row_tokens: int) -> Rows:
    strips = [trajectory_strip(one, BLOCK, MASK) for group in ANSWERS * repeats for one in group]
    return pack(strips, row_tokens, BLOCK, PAD).to("cuda")


def test_the_block_mask_of_whole_tiles_is_the_dense_one():
    packed = rows(8, 1000)
    mask, length = block_mask(packed.coordinates), packed.token_ids.shape[1]
    places = torch.arange(length, device="cuda")
    for row, dense in enumerate(dense_mask(packed.coordinates)):
        where = torch.tensor(row, device="cuda")
        assert torch.equal(mask.mask_mod(where, where * 0, places[:, None], places[None]).expand_as(dense[0]), dense[0])


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_flex_attention_learns_what_sdpa_learns_whatever_the_length(kind):
    flex, sdpa = random_lm(kind, head_dim=16), random_lm(kind, head_dim=16)  # FlexAttention takes no smaller heads
    flex.model.config._attn_implementation = "flex_attention"
    for packed in (rows(2, 100), rows(4, 300), rows(8, 1000)):
        gradients = []
        for lm in (flex, sdpa):
            scorer = LogprobModel(lm.model, lm.unsampled_ids).to("cuda")
            scorer.zero_grad()
            scorer(replace(packed, block_masks={}))[0].sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in scorer.parameters()]))
        assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


def test_few_graphs_are_compiled_for_many_lengths():
    lm = small_lm(attention="flex_attention", head_dim=16)
    scorer = LogprobModel(lm.model, lm.unsampled_ids).to("cuda")
    torch._dynamo.reset()
    counters.clear()
    for row_tokens in (100, 200, 400, 600, 800, 1000, 1500):
        for packed in (rows(6, row_tokens), rows(6, row_tokens).split(1)[0]):
            scorer(packed)[0].sum().backward()
            with torch.no_grad():
                scorer(packed)
    assert counters["stats"]["unique_graphs"] <= 6
