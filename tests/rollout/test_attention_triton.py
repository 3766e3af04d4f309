"""Attention of blocks on their slots, in Triton: what torch computes. Without a GPU the kernel is interpreted."""
# ruff: noqa: E402

import os
import sys
from functools import partial

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is first imported
pytest.importorskip("triton")

from dirl_cli.rollout.attention_triton import decode_attention
from dirl_cli.rollout.decoder import decoder_of
from dirl_cli.rollout.forward_gpu import GraphForward, block_attention, run_eagerly
from dirl_cli.rollout.requests import make_requests
from dirl_cli.rollout.scheduler import Scheduler
from dirl_cli.types import Decoding
from tests.helpers.small import small_lm

KERNEL = sys.modules[decode_attention.__module__]
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no bfloat16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(KERNEL, "TILE", 16)
    monkeypatch.setattr(KERNEL, "PROGRAMS", 1)


def both(ends, block, heads, key_heads, size, dtype=torch.float32, page_size=None):
    """Of blocks that end there, the first two in one slot, as a commit and the block after it are.

    page_size: tokens of a page; None for one page a slot. The slots' pages lie in any order, and begin with one page.
    """
    generator = torch.Generator().manual_seed(0)
    slots = torch.tensor([1, *range(1, len(ends))], device=DEVICE)
    page_size = page_size or max(ends) + 5
    longest = -(-max(ends) // page_size)
    table = torch.randperm(longest * len(ends) + 2, generator=generator)[: longest * len(ends)].view(len(ends), longest)
    if longest > 1:
        table[:, 0] = table[0, 0]
    shape = (longest * len(ends) + 2, page_size, key_heads, size)
    keys, values = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    query = torch.randn(heads, len(ends) * block, size, generator=generator).to(DEVICE, dtype).transpose(0, 1)
    given = (query, keys, values, table.to(DEVICE), slots, torch.tensor(ends, device=DEVICE), size**-0.5)
    return decode_attention(*given), block_attention(*given)


@pytest.mark.parametrize(
    ("block", "heads", "key_heads", "size"), [(4, 2, 2, 32), (4, 4, 1, 16), (1, 2, 1, 24), (3, 3, 1, 8), (32, 4, 1, 16)]
)
@pytest.mark.parametrize("page_size", [None, 6, 32])  # less than the kernel reads at a time, and more
def test_it_is_torchs_attention(block, heads, key_heads, size, page_size):
    ours, theirs = both([32, 32 + block, block], block, heads, key_heads, size, page_size=page_size)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("programs", [6, 24])  # the keys of a block in 2 and in 8 parts, of which some are empty
def test_several_programs_may_share_the_keys_of_a_block(monkeypatch, programs, dtype):
    monkeypatch.setattr(KERNEL, "PROGRAMS", programs)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    ours, theirs = both([4, 36, 60], 4, 2, 1, 16, dtype, page_size=8)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_what_lies_behind_a_blocks_end_is_not_seen():
    generator = torch.Generator().manual_seed(0)
    query, cached = torch.randn(4, 1, 16, generator=generator), torch.randn(3, 16, 1, 16, generator=generator)
    table = torch.tensor([[2, 0, 1]], device=DEVICE)  # the last page is not the slot's yet
    behind, inside = cached.clone(), cached.clone()
    behind[0, 4:], behind[1], inside[0, 3] = 1e4, 1e4, 1e4
    slot, end = torch.tensor([0], device=DEVICE), torch.tensor([20], device=DEVICE)
    found = partial(decode_attention, query.to(DEVICE), table=table, slots=slot, ends=end, scale=0.25)
    plain, same, other = (found(keys=kept.to(DEVICE), values=kept.to(DEVICE)) for kept in (cached, behind, inside))
    assert torch.equal(plain, same)
    assert not torch.equal(plain, other)


def test_a_model_decodes_with_it():
    lm, options = small_lm(), Decoding(strategy="low_confidence_static", denoising_steps=1, max_new_tokens=6)
    torch.nn.Module.to(lm.model, DEVICE)
    found = []
    for attention in (decode_attention, block_attention):
        with torch.inference_mode():
            scheduler = Scheduler(GraphForward(lm, decoder_of(lm.model), 2, 16, attention, run_eagerly), 2)
            for request in make_requests([[5] * 6, [7] * 9], 1, options, None, None):
                scheduler.add(request)
            found.append({one.request.prompt: one.part.token_ids for _ in range(2) for one in scheduler.step()})
    assert found[0] == found[1]
    assert len(found[0]) == 2
