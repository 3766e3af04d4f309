"""Attention of blocks on the keys and values in the pages of their slots, in Triton.

A program holds the queries of a block with all query heads that share a key head, and reads each key and value once.
Where blocks are few, several programs share the keys of a block and their results are combined (flash-decoding).

Shapes: N blocks of B tokens, P pages of the longest sequence, H query heads, K key heads, E head size; T = N * B.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # that keep a GPU busy
MOST_ROWS = 64  # queries of a program
TILE = 64  # keys of a step


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, slots: Tensor, ends: Tensor, scale: float
) -> Tensor:
    """Compute what `forward_gpu.block_attention` does, on a GPU. Parameters and result are the same."""
    tokens, heads, size = query.shape
    key_heads = keys.shape[2]
    block = tokens // len(slots)
    queries = heads // key_heads * block  # of a block, that share a key head
    rows = min(max(triton.next_power_of_2(queries), 16), MOST_ROWS)

    # A power of 2 of programs for the keys of each block, so many that the GPU is busy.
    programs = len(slots) * key_heads * triton.cdiv(queries, rows)
    splits = 1 << max(PROGRAMS // programs, 1).bit_length() - 1
    partial_dtype = torch.float32 if splits > 1 else query.dtype
    partials = query.new_empty((splits, tokens, heads, size), dtype=partial_dtype)
    weights = query.new_empty((splits, tokens, heads), dtype=torch.float32)
    _attend[len(slots), key_heads * triton.cdiv(queries, rows), splits](
        query,
        keys,
        values,
        table,
        slots,
        ends,
        partials,
        weights,
        scale,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        tokens,
        heads,
        table.stride(0),
        block=block,
        shared=heads // key_heads,
        size=size,
        page_size=keys.shape[1],
        width=max(triton.next_power_of_2(size), 16),
        rows=rows,
        tile=TILE,
        splits=splits,
        num_stages=3 if keys.dtype.itemsize == 2 else 2,
    )
    if splits == 1:
        return partials[0]
    attended = torch.empty_like(partials[0], dtype=query.dtype)
    _combine[tokens * heads,](
        partials, weights, attended, tokens * heads, size=size, width=triton.next_power_of_2(size), splits=splits
    )
    return attended


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    table,
    slots,
    ends,
    partials,
    weights,
    scale,
    query_token,
    query_head,
    key_page,
    key_position,
    key_head,
    tokens,
    heads,
    table_slot,
    block: tl.constexpr,
    shared: tl.constexpr,
    size: tl.constexpr,
    page_size: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
    splits: tl.constexpr,
):
    """Attention of queries on a split of the keys: (splits, T, H, E), and the log of its weight: (splits, T, H)."""
    # The grid: blocks, key heads by tiles of their queries, splits of the keys.
    tiles: tl.constexpr = (shared * block + rows - 1) // rows
    item = tl.program_id(0)
    head = tl.program_id(1) // tiles
    query_tile = tl.program_id(1) % tiles
    split = tl.program_id(2)
    pages = table + tl.load(slots + item) * table_slot
    end = tl.load(ends + item)
    split_length = tl.cdiv(tl.cdiv(end, tile), splits) * tile
    first = split * split_length
    last = tl.minimum(first + split_length, end)

    # A row is a query: the tokens of the block with one query head, then those with the next.
    row = query_tile * rows + tl.arange(0, rows)
    column = tl.arange(0, width)
    token = item * block + row % block
    query_at = head * shared + row // block
    is_query = (row < shared * block)[:, None] & (column < size)[None, :]
    q = tl.load(query + (token * query_token + query_at * query_head)[:, None] + column[None, :], is_query, 0.0)

    # Online softmax: sums relative to the largest score so far, shrunk whenever there is a larger one.
    largest = tl.full([rows], -float("inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    summed = tl.zeros([rows, width], tl.float32)
    for start in range(first, last, tile):
        position = start + tl.arange(0, tile)
        page = tl.load(pages + position // page_size, position < last, 0)
        at_key = page * key_page + position % page_size * key_position + head * key_head
        cached = at_key[:, None] + column[None, :]
        is_key = (position < last)[:, None] & (column < size)[None, :]
        k = tl.load(keys + cached, is_key, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((position < last)[None, :], scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - larger)
        p = tl.exp(scores - larger[:, None])
        v = tl.load(values + cached, is_key, 0.0)
        summed = summed * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        largest = larger

    total = tl.maximum(total, 1e-37)  # a split may have no keys
    at = (split * tokens + token) * heads + query_at
    tl.store(partials + at[:, None] * size + column[None, :], summed / total[:, None], is_query)
    if splits > 1:
        tl.store(weights + at, largest + tl.log(total), row < shared * block)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    partials, weights, attended, count, size: tl.constexpr, width: tl.constexpr, splits: tl.constexpr
):
    """The mean of the splits' results for one query and head, each by its weight."""
    at = tl.program_id(0)
    split = tl.arange(0, splits)
    column = tl.arange(0, width)
    weight = tl.load(weights + split * count + at)
    weight = tl.exp(weight - tl.max(weight, 0))
    index = (split * count + at)[:, None] * size + column[None, :]
    partial = tl.load(partials + index, (column < size)[None, :], 0.0)
    mean = tl.sum(partial * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(attended + at * size + column, mean, column < size)
