"""The attention rule as what transformers takes: a dense mask for SDPA, a BlockMask for FlexAttention."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from dirl_cli.diffusion.layout import PADDING, Coordinates, Rows, attends
from dirl_cli.errors import DirlError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128  # queries and keys that FlexAttention takes or leaves together
PAIRS = 2**24  # of tokens that are looked at together while a block mask is made


def dense_mask(coordinates: Coordinates) -> Tensor:
    """(R, 1, L, L) bool, true where a query may look. coordinates: (R, L)."""
    queries = Coordinates(*(c[:, :, None] for c in coordinates))
    keys = Coordinates(*(c[:, None, :] for c in coordinates))
    return attends(queries, keys)[:, None]


def block_mask(coordinates: Coordinates) -> "BlockMask":
    """The same rule as a BlockMask of whole tiles, evaluated from the coordinates in those that are mixed.

    coordinates: (R, L). Padding makes up for what L lacks, so that what is compiled meets few lengths. It is made
    without being compiled itself, and without ever holding all L × L pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    padding = (0, -coordinates.group.shape[1] % TILE)
    group, *others = (c.int() for c in coordinates)
    padded = Coordinates(pad(group, padding, value=PADDING), *(pad(c, padding) for c in others))

    def rule(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attends(Coordinates(*(c[row, q] for c in padded)), Coordinates(*(c[row, k] for c in padded)))

    seen = seen_in_tiles(padded)
    mixed, whole = (seen > 0) & (seen < TILE**2), seen == TILE**2
    return BlockMask.from_kv_blocks(*tile_order(mixed), *tile_order(whole), BLOCK_SIZE=TILE, mask_mod=rule)


def seen_in_tiles(coordinates: Coordinates) -> Tensor:
    """How many keys the queries of each tile see: (R, L / 128, L / 128). coordinates: (R, L)."""
    rows, length = coordinates.group.shape
    keys = Coordinates(*(c[:, None, :] for c in coordinates))
    counts = []
    for parts in zip(*(c.split(max(PAIRS // (rows * length * TILE), 1) * TILE, 1) for c in coordinates), strict=True):
        seen = attends(Coordinates(*(c[:, :, None] for c in parts)), keys)  # (R, some of L, L)
        counts.append(seen.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE)).sum((2, 4)))
    return torch.cat(counts, 1)


def tile_order(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many of `tiles` (R, T, T) each tile of queries takes, and all tiles, those in front: a BlockMask's way."""
    tiles = tiles[:, None].int()
    return tiles.sum(-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).int()


def attention_mask(rows: Rows, implementation: str, dtype: torch.dtype) -> "Tensor | BlockMask":
    """What the model's attention implementation takes as its mask. dtype: that of the queries."""
    if implementation == "flex_attention":
        device = rows.token_ids.device
        if device not in rows.block_masks:
            rows.block_masks[device] = block_mask(rows.coordinates)
        return rows.block_masks[device]
    seen = dense_mask(rows.coordinates)
    # SDPA would turn bools into these numbers once per layer, and backpropagation keep them all
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def hidden_states(model: PreTrainedModel, rows: Rows) -> Tensor:
    """The decoder's last hidden states under the attention rule: (R, L, D)."""
    implementation = model.config._attn_implementation
    uses_flex, length = implementation == "flex_attention", rows.token_ids.shape[1]
    if uses_flex and torch.is_grad_enabled() and rows.token_ids.device.type == "cpu":
        raise DirlError("attention=flex cannot learn on a CPU: leave it at auto")
    device = rows.token_ids.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    padding = (0, -length % TILE if uses_flex else 0)
    output = model.get_decoder()(
        input_ids=pad(rows.token_ids, padding),
        position_ids=pad(rows.position, padding),
        attention_mask=attention_mask(rows, implementation, dtype),
        use_cache=False,
    )
    return output.last_hidden_state[:, :length]
