"""Attention of blocks on the keys and values of their slots, in Triton.

A program holds the queries of a block with all query heads that share a key head, and reads each key and value once.
Where blocks are few, several programs share the keys of a block and their results are combined (flash-decoding).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # that keep a GPU busy
MOST_ROWS = 64  # queries of a program
TILE = 64  # keys of a step


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, ends: Tensor, scale: float) -> Tensor:
    """See `forward_gpu.block_attention`, which this is for a GPU."""
    tokens, heads, size = query.shape
    block, key_heads = tokens // len(slots), keys.shape[2]
    queries = heads // key_heads * block
    rows = min(max(triton.next_power_of_2(queries), 16), MOST_ROWS)
    programs = len(slots) * key_heads * triton.cdiv(queries, rows)
    splits = 1 << max(PROGRAMS // programs, 1).bit_length() - 1
    parts = query.new_empty((splits, tokens, heads, size), dtype=torch.float32 if splits > 1 else query.dtype)
    weights = query.new_empty((splits, tokens, heads), dtype=torch.float32)
    _attend[len(slots), key_heads * triton.cdiv(queries, rows), splits](
        query,
        keys,
        values,
        slots,
        ends,
        parts,
        weights,
        scale,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        tokens,
        heads,
        block=block,
        shared=heads // key_heads,
        size=size,
        width=max(triton.next_power_of_2(size), 16),
        rows=rows,
        tile=TILE,
        splits=splits,
        num_stages=3 if keys.dtype.itemsize == 2 else 2,
    )
    if splits == 1:
        return parts[0]
    found = torch.empty_like(parts[0], dtype=query.dtype)
    _combine[tokens * heads,](
        parts, weights, found, tokens * heads, size=size, width=triton.next_power_of_2(size), splits=splits
    )
    return found


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    slots,
    ends,
    parts,
    weights,
    scale,
    query_token,
    query_head,
    key_slot,
    key_position,
    key_head,
    tokens,
    heads,
    block: tl.constexpr,
    shared: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
    splits: tl.constexpr,
):
    """A share of the keys for some queries: their attention (splits, T, heads, size) and the log of its weight."""
    tiles: tl.constexpr = (shared * block + rows - 1) // rows
    item, split = tl.program_id(0), tl.program_id(2)
    head, part = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    slot, end = tl.load(slots + item), tl.load(ends + item)
    share = tl.cdiv(tl.cdiv(end, tile), splits) * tile
    first, last = split * share, tl.minimum(split * share + share, end)

    row, column = part * rows + tl.arange(0, rows), tl.arange(0, width)
    token, query_at = item * block + row % block, head * shared + row // block
    is_query = (row < shared * block)[:, None] & (column < size)[None, :]
    q = tl.load(query + (token * query_token + query_at * query_head)[:, None] + column[None, :], is_query, 0.0)

    largest = tl.full([rows], -float("inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    summed = tl.zeros([rows, width], tl.float32)
    for start in range(first, last, tile):
        position = start + tl.arange(0, tile)
        cached = (slot * key_slot + position * key_position + head * key_head)[:, None] + column[None, :]
        is_key = (position < last)[:, None] & (column < size)[None, :]
        k = tl.load(keys + cached, is_key, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((position < last)[None, :], scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink, p = tl.exp(largest - larger), tl.exp(scores - larger[:, None])
        v = tl.load(values + cached, is_key, 0.0)
        summed = summed * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        largest = larger

    total = tl.maximum(total, 1e-37)  # of no keys
    at = (split * tokens + token) * heads + query_at
    tl.store(parts + at[:, None] * size + column[None, :], summed / total[:, None], is_query)
    if splits > 1:
        tl.store(weights + at, largest + tl.log(total), row < shared * block)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    parts, weights, found, count, size: tl.constexpr, width: tl.constexpr, splits: tl.constexpr
):
    """The shares of one query and head, each by its weight."""
    at, split, column = tl.program_id(0), tl.arange(0, splits), tl.arange(0, width)
    weight = tl.load(weights + split * count + at)
    weight = tl.exp(weight - tl.max(weight, 0))
    places = (split * count + at)[:, None] * size + column[None, :]
    part = tl.load(parts + places, (column < size)[None, :], 0.0)
    mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(found + at * size + column, mean, column < size)
