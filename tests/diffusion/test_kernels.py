"""Drawing by the Triton kernels: what torch draws. On a GPU they are compiled, elsewhere interpreted."""

import os

import pytest
import torch

from dirl_cli.diffusion.sampling import draw_candidates, draw_fused, draw_seed, entropy, exponential, temper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is first imported
pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from dirl_cli.diffusion import kernels  # noqa: E402
from dirl_cli.diffusion.kernels import draw_rows  # noqa: E402
from tests.helpers.gpu_targets import compile_for  # noqa: E402

NONE = torch.tensor([], dtype=torch.long)


def some_seeds(n: int, first: int = 0) -> torch.Tensor:
    return draw_seed(torch.arange(first, first + n), torch.tensor(7), torch.tensor(1)).to(DEVICE)


def case(n: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(n, vocabulary, generator=generator)
    return logits.to(DEVICE, dtype), some_seeds(n, first=vocabulary)


def assert_same(logits, seeds, temperature, unsampled):
    """The kernels' answers are those of torch's own operations."""
    tokens, logprobs, likeliest, margins, entropies = draw_rows(logits, seeds, temperature, unsampled.to(DEVICE))
    expected = draw_candidates(
        logits.cpu(), None if seeds is None else seeds.cpu(), temperature, 0, 1.0, "max", unsampled.cpu()
    )
    assert tokens.tolist() == expected.tokens.tolist()
    for ours, theirs in ((logprobs, expected.logprobs), (likeliest.exp(), expected.confidence)):
        torch.testing.assert_close(ours.cpu(), theirs, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropies.cpu(), expected.entropy, atol=5e-6, rtol=1e-6)
    if logits.shape[1] > 1:
        torch.testing.assert_close(margins.cpu(), expected.margin, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 5, 16, 37, 300, 5000])  # less than a tile and more, chunks whole or not
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_log_probs_and_entropies_are_those_of_torch(vocabulary, temperature, dtype):
    assert_same(*case(8, vocabulary, dtype), temperature, NONE)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_greedy_takes_the_largest(temperature):
    logits, _ = case(8, 37)
    assert_same(logits, None, temperature, NONE)


def test_the_left_one_of_equals_is_the_largest():
    logits = torch.zeros(3, 50, device=DEVICE)
    logits[0, [20, 40]] = logits[1, [16, 17]] = 1.0
    tokens, _, _, margins, _ = draw_rows(logits, None, 1.0, NONE.to(DEVICE))
    assert tokens.tolist() == [20, 16, 0]
    assert margins.tolist() == [0, 0, 0]  # of two in different chunks, of two in one, of all


def test_ids_that_are_not_sampled_are_never_drawn_even_where_they_fill_chunks():
    logits, _ = case(1, 70)
    unsampled = torch.tensor([*range(20), 33, *range(48, 70)])  # two chunks of eight and a half, one token, the end
    assert_same(logits.expand(200, 70), some_seeds(200), 1.0, unsampled)
    assert_same(logits, None, 1.0, unsampled)


def test_logits_of_minus_infinity_and_of_any_size_are_well():
    logits = torch.full((3, 40), -torch.inf)
    logits[0, 3] = 1e30
    logits[1, [2, 39]] = -1e4
    logits[2, :30] = torch.linspace(-90, 90, 30)
    for first in range(0, 30, 3):
        assert_same(logits.to(DEVICE), some_seeds(3, first), 1.0, NONE)


def test_logits_that_are_no_numbers_draw_a_token_of_the_vocabulary():
    logits = torch.full((2, 45), torch.nan, device=DEVICE)
    for seeds in (None, some_seeds(2)):
        tokens = draw_rows(logits, seeds, 1.0, NONE.to(DEVICE))[0]
        assert ((tokens >= 0) & (tokens < 45)).all()


@triton.jit
def _numbers(seeds, out, width: tl.constexpr):
    row = tl.program_id(0)
    number = tl.arange(0, width)
    tl.store(out + row * width + number, kernels._exponential(tl.load(seeds + row), number))


def test_a_kernels_random_numbers_are_torchs():
    seeds = torch.cat([some_seeds(30), torch.tensor([0, -1, 2**63 - 1, -(2**63)], device=DEVICE)])
    ours = torch.empty(len(seeds), 64, dtype=torch.float64, device=DEVICE)
    _numbers[(len(seeds),)](seeds, ours, width=64)
    theirs = exponential(seeds[:, None].cpu(), torch.arange(64))
    # Of other bits nothing would be close; the logarithms of two libraries may differ in the last one.
    torch.testing.assert_close(ours.cpu(), theirs, atol=0, rtol=1e-15)


def test_rows_that_lie_apart_are_read_where_they_are():
    logits, seeds = case(12, 40)
    assert_same(logits[::2, :37], seeds[:6], 1.0, NONE)


def test_no_rows_draw_nothing():
    logits, seeds = case(4, 20)
    assert [len(each) for each in draw_rows(logits[:0], seeds[:0], 1.0, NONE.to(DEVICE))] == [0] * 5


@pytest.mark.parametrize("confidence", ["sampled", "max", "entropy"])
def test_candidates_are_the_same_and_their_distribution_waits_to_be_asked_for(confidence):
    logits, seeds = case(6, 300)
    unsampled = torch.tensor([7, 299], device=DEVICE)
    found = draw_fused(logits, seeds, 0.8, confidence, unsampled)
    expected = draw_candidates(logits.cpu(), seeds.cpu(), 0.8, 0, 1.0, confidence, unsampled.cpu())
    assert found.tokens.tolist() == expected.tokens.tolist()
    for name in ("logprobs", "confidence", "entropy", "margin"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), atol=5e-6, rtol=1e-5)
    assert "distribution" not in found.__dict__
    torch.testing.assert_close(found.distribution, temper(logits, 0.8, unsampled).log_softmax(-1))
    torch.testing.assert_close(entropy(found.distribution), found.entropy, atol=5e-6, rtol=1e-5)


COMPILE = """
from dirl_cli.diffusion import kernels

sums, found, sizes = ["*fp32"] * 3, ["*i64", *["*fp32"] * 4], ["i32", "i32", "fp32", "i32"]
width = kernels.chunk_width(151_936)
for logits in ("*bf16", "*fp32"):
    tile = {"in_tile": kernels.TILE // width, "width": width}
    assert compiled(kernels._sum_up, [logits, "*i1", *sums, *sizes], 8, **tile).asm["cubin"]
    for greedy in (False, True):
        types = [logits, "*i1", "*i64", *sums, *found, *sizes]
        assert compiled(kernels._draw, types, 8, greedy=greedy, width=width, lanes=1024).asm["cubin"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_kernels_compile_for_gpus_that_are_not_here(architecture):
    compile_for(architecture, COMPILE)
