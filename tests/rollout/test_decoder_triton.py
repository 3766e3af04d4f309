"""The functions between a layer's products, in Triton: what the plain ones compute. Without a GPU it is interpreted."""
# ruff: noqa: E402

import math
import os
import sys

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is first imported
pytest.importorskip("triton")

from dirl_cli.models.kv_cache import KVCache
from dirl_cli.rollout.decoder import JoinedDecoder
from dirl_cli.rollout.decoder_triton import FUSED
from dirl_cli.rollout.layer_functions import PLAIN, Functions, Heads, Norm
from tests.rollout.test_decoder import Kernels, family

NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no bfloat16
GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(sys.modules[FUSED.gated.__module__], "COLUMNS", 16)  # several programs a token
    GENERATOR.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR).to(DEVICE, dtype)


def norm(size: int, dtype: torch.dtype = torch.float32, eps: float = 0.1) -> Norm:
    """An eps that is no rounding error."""
    return Norm(1 + 0.3 * random(size, dtype=dtype), eps, torch.tensor(math.sqrt(eps), device=DEVICE))


def tolerance(*dtypes: torch.dtype) -> dict[str, float]:
    is_narrow = NARROW in dtypes
    return {"atol": 2e-2, "rtol": 1e-2} if is_narrow else {"atol": 2e-6, "rtol": 1e-5}


@pytest.mark.parametrize("size", [32, 24])  # whole powers of 2, and what lies between
@pytest.mark.parametrize(
    ("stream", "weight", "to"),
    [
        (torch.float32, torch.float32, None),
        (NARROW, NARROW, NARROW),
        (torch.float32, torch.float32, NARROW),  # as under autocast
        (NARROW, torch.float32, None),
    ],
)
def test_add_and_norm(size, stream, weight, to):
    x, change, of = random(5, size, dtype=stream), random(5, size, dtype=to or stream), norm(size, weight)
    ours, theirs = x.clone(), x.clone()
    for given in (None, change):
        found, expected = FUSED.add_and_norm(ours, given, of, to), PLAIN.add_and_norm(theirs, given, of, to)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, **tolerance(stream, found.dtype))
        torch.testing.assert_close(ours, theirs, **tolerance(stream))
    assert not torch.equal(ours, x)


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize(
    ("queries", "keys", "size", "norms", "rotates"),
    [(4, 2, 16, True, True), (3, 1, 24, True, True), (2, 2, 8, False, True), (4, 1, 8, False, False)],
)
def test_rotate_and_cache(queries, keys, size, norms, rotates, dtype):
    heads = Heads(queries, keys, size, norm(size) if norms else None, norm(size) if norms else None, rotates)
    qkv = random(5, queries + 2 * keys, size, dtype=dtype)
    angle = random(5, size // 2).repeat(1, 2) * 9
    rotation = torch.stack([angle.cos(), angle.sin()], 1)
    index = torch.tensor([9, 2, 0, 17, 4], device=DEVICE)
    found, expected = [], []
    for functions, results in ((FUSED, found), (PLAIN, expected)):
        cached = [torch.full((3, 6, keys, size), -7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
        results += [functions.rotate_and_cache(qkv, heads, rotation, *cached, index), *cached]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, **tolerance(dtype))
    written = (found[1].flatten(0, 1) != -7).all(-1).all(-1)
    assert written.nonzero().flatten().tolist() == sorted(index.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("inner", [16, 40])
def test_gated(inner, dtype):
    gate_up = 4 * random(5, 2 * inner, dtype=dtype)
    torch.testing.assert_close(FUSED.gated(gate_up), PLAIN.gated(gate_up), **tolerance(dtype))


def forward(decoder: JoinedDecoder, cache: KVCache) -> torch.Tensor:
    """Final hidden states of four tokens that see themselves."""
    position = torch.arange(4, device=DEVICE)

    def attend(query, keys, values, scale):
        return query  # one kernel of its own, which is tested elsewhere

    with torch.no_grad():
        return decoder(cache, position + 5, position, position + 16, attend)


@pytest.mark.parametrize("name", ["llama", "qwen2", "sdar", "sdar_moe", "smollm3"])
def test_models_decode_with_them(name):
    model = family(name).to(DEVICE)
    ours, theirs = (forward(JoinedDecoder(model, "plain", f), KVCache(2, 16, 16)) for f in (FUSED, PLAIN))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_layer_is_four_products_attention_and_four_kernels_between_them():
    calls = []

    def counted(function):
        def call(*args):
            calls.append(function.__name__)
            with _disable_current_modes():  # of which the interpreter makes copies
                return function(*args)

        return call

    functions = Functions(*(counted(f) for f in (FUSED.add_and_norm, FUSED.rotate_and_cache, FUSED.gated)))
    decoder, cache = JoinedDecoder(family("sdar").to(DEVICE), "plain", functions), KVCache(2, 16, 16)
    forward(decoder, cache)  # makes the cache and its angles
    calls.clear()
    with Kernels() as kernels:
        forward(decoder, cache)
    layer = ["add_and_norm", "rotate_and_cache", "add_and_norm", "gated"]
    assert calls == 3 * layer + ["add_and_norm"]
    assert kernels.names == {"mm": 3 * 4, "embedding": 1, "index_select": 1, "arange": 1, "add": 2}  # two of `forward`
