"""Drawing by the Triton kernels: what torch draws. On a GPU they are compiled, elsewhere interpreted."""

import os
import subprocess
import sys

import pytest
import torch

from dirl_cli.diffusion.sampling import draw_candidates, draw_fused, entropy, temper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is first imported
pytest.importorskip("triton")

from dirl_cli.diffusion.kernels import draw_rows  # noqa: E402

NONE = torch.tensor([], dtype=torch.long)
NEARLY_ONE = 1 - 2**-53


def case(n: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(n, vocabulary, generator=generator)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    uniform[:3] = torch.tensor([0.0, NEARLY_ONE, 1e-12], dtype=torch.float64)
    return logits.to(DEVICE, dtype), uniform.to(DEVICE)


def assert_same(logits, uniform, temperature, unsampled, chunk):
    """The kernels' answers are those of torch's own operations."""
    unsampled = unsampled.to(DEVICE)
    tokens, logprobs, likeliest, entropies = draw_rows(logits, uniform, temperature, unsampled, chunk)
    expected = draw_candidates(
        logits.cpu(), None if uniform is None else uniform.cpu(), temperature, 0, 1.0, "max", unsampled.cpu()
    )
    assert tokens.tolist() == expected.tokens.tolist()
    for ours, theirs in ((logprobs, expected.logprobs), (likeliest.exp(), expected.confidence)):
        torch.testing.assert_close(ours.cpu(), theirs, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropies.cpu(), expected.entropy, atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [5, 16, 37, 64])  # less than a chunk, a chunk, and more, whole or not
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_log_probs_and_entropies_are_those_of_torch(vocabulary, temperature, dtype):
    assert_same(*case(8, vocabulary, dtype), temperature, NONE, chunk=16)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_greedy_takes_the_largest(temperature):
    logits, _ = case(8, 37)
    assert_same(logits, None, temperature, NONE, chunk=16)


def test_the_left_one_of_equals_is_the_largest():
    logits = torch.zeros(3, 50, device=DEVICE)
    logits[0, [20, 40]] = logits[1, [16, 17]] = 1.0
    assert draw_rows(logits, None, 1.0, NONE.to(DEVICE), 16)[0].tolist() == [20, 16, 0]


@pytest.mark.parametrize("u", [0.0, 0.3, NEARLY_ONE])
def test_ids_that_are_not_sampled_are_never_drawn_even_where_they_fill_chunks(u):
    logits, _ = case(4, 70)
    unsampled = torch.tensor([*range(20), 33, *range(48, 70)])  # the first chunk, the fourth and the last
    assert_same(logits, torch.full((4,), u, dtype=torch.float64, device=DEVICE), 1.0, unsampled, chunk=16)
    assert_same(logits, None, 1.0, unsampled, chunk=16)


@pytest.mark.parametrize("u", [0.0, 0.2, 0.5, NEARLY_ONE])
def test_logits_of_minus_infinity_and_of_any_size_are_well(u):
    logits = torch.full((3, 40), -torch.inf)
    logits[0, 3] = 1e30
    logits[1, [2, 39]] = -1e4
    logits[2, :30] = torch.linspace(-90, 90, 30)
    uniform = torch.full((3,), u, dtype=torch.float64)
    assert_same(logits.to(DEVICE), uniform.to(DEVICE), 1.0, NONE, chunk=16)


def test_every_token_is_drawn_by_the_numbers_of_its_own_stretch():
    """Uniform numbers in the middle of each token's stretch of the cumulative distribution."""
    logits = case(3, 45)[0][:1]
    probabilities = logits.double().softmax(1)
    middle = (probabilities.cumsum(1) - probabilities / 2).squeeze(0)
    tokens = draw_rows(logits.expand(45, 45), middle, 1.0, NONE.to(DEVICE), 16)[0]
    assert tokens.tolist() == list(range(45))


def test_rows_that_lie_apart_are_read_where_they_are():
    logits, uniform = case(12, 40)
    assert_same(logits[::2, :37], uniform[:6], 1.0, NONE, chunk=16)


def test_no_rows_draw_nothing():
    logits, uniform = case(4, 20)
    assert [len(each) for each in draw_rows(logits[:0], uniform[:0], 1.0, NONE.to(DEVICE), 16)] == [0] * 4


@pytest.mark.parametrize("confidence", ["sampled", "max", "entropy"])
def test_candidates_are_the_same_and_their_distribution_waits_to_be_asked_for(confidence):
    logits, uniform = case(6, 300)
    unsampled = torch.tensor([7, 299], device=DEVICE)
    found = draw_fused(logits, uniform, 0.8, confidence, unsampled)
    expected = draw_candidates(logits.cpu(), uniform.cpu(), 0.8, 0, 1.0, confidence, unsampled.cpu())
    assert found.tokens.tolist() == expected.tokens.tolist()
    for name in ("logprobs", "confidence", "entropy"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), atol=5e-6, rtol=1e-5)
    assert "distribution" not in found.__dict__
    torch.testing.assert_close(found.distribution, temper(logits, 0.8, unsampled).log_softmax(-1))
    torch.testing.assert_close(entropy(found.distribution), found.entropy, atol=5e-6, rtol=1e-5)


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dirl_cli.diffusion import kernels

def compiled(kernel, types, **constants):
    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    return triton.compile(ASTSource(kernel, signature, places), target=target, options={"num_warps": 8})

sums, found, sizes = ["*fp32"] * 3, ["*i64", *["*fp32"] * 3], ["i32", "i32", "fp32"]
for logits in ("*bf16", "*fp32"):
    assert compiled(kernels._sum_up, [logits, "*i1", *sums, *sizes], width=kernels.CHUNK).asm["cubin"]
    for greedy, uniform in ((False, "*fp64"), (True, logits)):
        types = [logits, "*i1", uniform, *sums, *found, *sizes, "i32"]
        assert compiled(kernels._draw, types, greedy=greedy, width=kernels.CHUNK, lanes=64).asm["cubin"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_kernels_compile_for_gpus_that_are_not_here(architecture):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join(place for place in sys.path if place)
    subprocess.run([sys.executable, "-c", COMPILE, architecture], check=True, env=environment | {"PYTHONPATH": path})
