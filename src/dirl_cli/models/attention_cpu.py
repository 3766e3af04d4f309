"""Attention of packed rows on a CPU: next to no pair of tokens is computed that the rule forbids.

A row is cut into tiles of queries that stand side by side. Most keys that a tile looks at are seen by all its queries:
they are slices of the clean copy, and need no mask. The others, among them the tile itself, are gathered and masked by
the rule. The parts are merged by the normalisers of their softmaxes. For the backward what comes in and out is kept,
and nothing of the weights.

Shapes: R rows of L tokens; H heads of queries, K of keys, D values of a head; n queries in a tile, m of its keys mixed.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dirl_cli.diffusion.layout import PADDING, SHARED, Coordinates, attends

TILES = "dirl_tiles"
QUERIES = 128  # of a tile, unless a block is longer
FEW = 64  # keys that are not worth a call of their own
CALL = 4096  # pairs of tokens that are computed in the time that a call takes by itself

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Tile:
    """n queries of a row, and the keys that they look at.

    seen_by_all: slices of keys that each of them sees. mixed: (m,) where the other keys stand, which some of them see.
    mask: (n, m), 0 where a query sees a mixed key and -inf where it does not.
    """

    row: int
    queries: slice
    seen_by_all: Sequence[slice]
    mixed: Tensor
    mask: Tensor


def attention_tiles(coordinates: Coordinates, dtype: torch.dtype) -> list[Tile]:
    """The tiles of rows, in which all tokens but padding are queries. coordinates: (R, L). dtype: of the queries."""
    tiles = []
    for r in range(len(coordinates.strip)):
        row = PackedRow(Coordinates(*(c[r] for c in coordinates)))
        for start, stop in row.tiles():
            seen_by_all, ranges = row.keys(start, stop)
            mixed = torch.cat([torch.arange(*keys) for keys in ranges])
            queries = Coordinates(*(c[r, start:stop, None] for c in coordinates))
            keys = Coordinates(*(c[r, mixed] for c in coordinates))
            mask = torch.zeros(stop - start, len(mixed), dtype=dtype).masked_fill_(~attends(queries, keys), -torch.inf)
            tiles.append(Tile(r, slice(start, stop), [slice(*keys) for keys in seen_by_all], mixed, mask))
    return tiles


@dataclass(frozen=True)
class Run:
    """Neighbours of one strip, sequence and view, whose blocks ascend."""

    start: int
    stop: int
    strip: int
    sequence: int
    view: int


Range = tuple[int, int]  # from the first token to before the last


class PackedRow:
    """A row cut into tiles by its coordinates, (L,) each.

    As `pack` lays them, the tokens of a strip stand together, and so do those of a block in a view.
    """

    def __init__(self, coordinates: Coordinates) -> None:
        strip, sequence, block, view = coordinates
        begins = torch.ones_like(strip, dtype=torch.bool)
        begins[1:] = (strip.diff() != 0) | (sequence.diff() != 0) | (view.diff() != 0) | (block.diff() < 0)
        starts = begins.nonzero().squeeze(1)
        stops = [*starts[1:].tolist(), len(strip)]
        columns = (starts.tolist(), stops, strip[starts].tolist(), sequence[starts].tolist(), view[starts].tolist())

        self.blocks: list[int] = block.tolist()
        self.runs = [run for run in map(Run, *columns) if run.strip != PADDING]
        self.clean: dict[tuple[int, int], list[Run]] = defaultdict(list)  # by strip and sequence
        for run in self.runs:
            if run.view == 0:
                self.clean[run.strip, run.sequence].append(run)

    def tiles(self) -> list[Range]:
        """Tiles of whole blocks, those beside each other joined where that takes no more pairs and calls than apart."""
        tiles: list[Range] = []
        for start, stop in self.pieces():
            if tiles:
                first, last = tiles[-1]
                apart = self.cost(first, last) + self.cost(start, stop)
                if stop - first <= QUERIES and self.cost(first, stop) <= apart:
                    tiles[-1] = (first, stop)
                    continue
            tiles.append((start, stop))
        return tiles

    def pieces(self) -> Iterator[Range]:
        """Whole blocks of a run, together at most `QUERIES` tokens unless one is longer."""
        for run in self.runs:
            start = run.start
            while start < run.stop:
                stop = min(start + QUERIES, run.stop)
                if stop < run.stop:
                    # The block that goes on here is left to the next piece, or taken whole if it is longer than one.
                    block = self.blocks[stop]
                    stop = bisect_left(self.blocks, block, start, stop)
                    if stop == start:
                        stop = bisect_right(self.blocks, block, start, run.stop)
                yield start, stop
                start = stop

    def cost(self, start: int, stop: int) -> int:
        """Pairs of tokens that a tile computes, its calls counted as `CALL` of them each."""
        seen_by_all, mixed = self.keys(start, stop)
        keys = sum(last - first for first, last in (*seen_by_all, *mixed))
        return (stop - start) * keys + CALL * (len(seen_by_all) + 1)

    def keys(self, start: int, stop: int) -> tuple[list[Range], list[Range]]:
        """Ranges of keys that all queries of a tile see, and of those that some may see, the tile itself first."""
        first = bisect_right(self.runs, start, key=lambda run: run.start) - 1
        last = bisect_left(self.runs, stop, key=lambda run: run.start)
        runs = self.runs[first:last]
        earliest = min(self.blocks[max(start, run.start)] for run in runs)
        latest: dict[tuple[int, int], int] = defaultdict(int)  # block of the queries that see a strip's sequence
        for run in runs:
            for sequence in {run.sequence, SHARED}:
                block = self.blocks[min(stop, run.stop) - 1]
                latest[run.strip, sequence] = max(latest[run.strip, sequence], block)

        is_one_strip = len({run.strip for run in runs}) == 1
        sequences = {run.sequence for run in runs}
        seen_by_all: list[Range] = []
        mixed = [(start, stop)]
        for (strip, sequence), block in latest.items():
            is_seen_by_all = is_one_strip and (sequence == SHARED or sequences == {sequence})
            for clean in self.clean[strip, sequence]:
                # Some see it up to the latest block, all up to the earliest. The tile itself is there already.
                end = bisect_left(self.blocks, block, clean.start, clean.stop)
                common = clean.start
                if is_seen_by_all:
                    common = min(bisect_left(self.blocks, earliest, clean.start, clean.stop), start)
                if common - clean.start < FEW:
                    common = clean.start
                else:
                    seen_by_all.append((clean.start, common))
                mixed += [(common, min(end, start)), (max(clean.start, stop), end)]
        return seen_by_all, [keys for keys in mixed if keys[0] < keys[1]]


class TiledAttention(torch.autograd.Function):
    """Attention by tiles; a query in no tile, which is padding, gets zeros."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float) -> Tensor:
        """query: (R, H, L, D). key, value: (R, K, L, D). Returns (R, L, H, D)."""
        rows, heads, length, size = query.shape
        output = query.new_zeros(rows, length, heads, size)
        normalisers = query.new_zeros(rows, heads, length, dtype=torch.float32)  # log of the sum of exponentials
        for tile in tiles:
            queries = fold(query[tile.row, :, tile.queries], key.shape[1])
            parts = []
            for keys, mask in key_parts(tile, heads // key.shape[1]):
                part_of_tile = (queries, take(key, tile.row, keys), take(value, tile.row, keys))
                parts.append(flash(*part_of_tile, attn_mask=mask, scale=scale))

            attended, normaliser = parts[0]
            if len(parts) > 1:
                normaliser = torch.stack([part for _, part in parts]).logsumexp(0)
                attended = sum(out * (part - normaliser).exp()[..., None] for out, part in parts)
            output[tile.row, tile.queries] = attended.reshape(heads, -1, size).transpose(0, 1)
            normalisers[tile.row, :, tile.queries] = normaliser.reshape(heads, -1)

        ctx.save_for_backward(query, key, value, output, normalisers)
        ctx.tiles = tiles
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, normalisers = ctx.saved_tensors
        heads, key_heads, size = query.shape[1], key.shape[1], key.shape[3]
        query_gradient = torch.zeros_like(query)
        # Many tiles add to what one key gets: in fp32, whatever it is in the end.
        key_gradient = torch.zeros_like(key, dtype=torch.float32)
        value_gradient = torch.zeros_like(value, dtype=torch.float32)
        for tile in ctx.tiles:
            queries = fold(query[tile.row, :, tile.queries], key_heads)
            attended = fold(output[tile.row, tile.queries].transpose(0, 1), key_heads)
            upstream = fold(output_gradient[tile.row, tile.queries].transpose(0, 1), key_heads)
            normaliser = normalisers[tile.row, :, tile.queries].reshape(1, key_heads, -1)
            for keys, mask in key_parts(tile, heads // key_heads):
                of_queries, of_keys, of_values = flash_backward(
                    upstream,
                    queries,
                    take(key, tile.row, keys),
                    take(value, tile.row, keys),
                    attended,
                    normaliser,
                    0.0,
                    False,
                    attn_mask=mask,
                    scale=ctx.scale,
                )
                query_gradient[tile.row, :, tile.queries] += of_queries.reshape(heads, -1, size)
                for total, part in ((key_gradient, of_keys), (value_gradient, of_values)):
                    if isinstance(keys, slice):
                        total[tile.row, :, keys] += part[0]
                    else:
                        total[tile.row].index_add_(1, keys, part[0].float())
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype), None, None


def key_parts(tile: Tile, group: int) -> Iterator[tuple[slice | Tensor, Tensor | None]]:
    """Which keys of its row a tile takes in each call, and the mask there. group: query heads to a head of keys."""
    for keys in tile.seen_by_all:
        yield keys, None
    yield tile.mixed, tile.mask.repeat(group, 1)


def fold(heads: Tensor, key_heads: int) -> Tensor:
    """The query heads of one head of keys as further queries of one head: (1, K, H / K · n, D) from (H, n, D)."""
    return heads.reshape(1, key_heads, -1, heads.shape[-1])


def take(heads: Tensor, row: int, keys: slice | Tensor) -> Tensor:
    """Some keys of a row, or their values: (1, K, m, D) from (R, K, L, D)."""
    if isinstance(keys, slice):
        return heads[row, None, :, keys]
    return heads[row, None].index_select(2, keys)


def tiled_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tiles: Sequence[Tile] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' decoders call it: by tiles, where the caller of the model gives them, else SDPA.

    query: (R, H, L, D). key, value: (R, K, L, D). Returns (R, L, H, D).
    """
    if tiles is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    dtype = tiles[0].mask.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # What tiles cannot do, for the few models that ask it of them.
    if dropout or value.shape[3] != key.shape[3]:
        mask = as_dense_mask(tiles, len(query), query.shape[2])
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    if scaling is None:
        scaling = query.shape[3] ** -0.5
    return TiledAttention.apply(query, key, value, tiles, scaling), None


def as_dense_mask(tiles: Sequence[Tile], rows: int, length: int) -> Tensor:
    """What tiles let through as numbers to add to the logits, 0 or -inf: (R, 1, L, L)."""
    mask = torch.full((rows, 1, length, length), -torch.inf, dtype=tiles[0].mask.dtype)
    mask.diagonal(dim1=2, dim2=3).zero_()  # padding, which is in no tile, has to see something
    for tile in tiles:
        of_queries = mask[tile.row, 0, tile.queries]
        for keys in tile.seen_by_all:
            of_queries[:, keys] = 0
        of_queries[:, tile.mixed] = tile.mask
    return mask


AttentionInterface.register(TILES, tiled_attention)
AttentionMaskInterface.register(TILES, sdpa_mask)
