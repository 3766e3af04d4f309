"""The attention rule as what transformers takes: a dense mask for SDPA, a BlockMask for FlexAttention, tiles on a CPU.

Shapes: R rows of L tokens, T = L / 128 tiles of queries and as many of keys, D values of a hidden state.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from dirl_cli.diffusion.layout import PADDING, Coordinates, Rows, attends
from dirl_cli.errors import DirlError
from dirl_cli.models.attention_cpu import TILES, attention_tiles
from dirl_cli.models.context import UNDIVIDED, ContextGroup, pad_rows

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128  # queries and keys that FlexAttention takes or leaves together
DENSE_TOKENS = 512  # of a row: up to some 400 a dense mask is quicker on a CPU, at 512 tiles are, up to 1.3 times
PAIRS = 2**24  # of tokens that are looked at together while a block mask is made


def dense_mask(coordinates: Coordinates) -> Tensor:
    """The rule as a mask, true where a query may look: (R, 1, L, L) bool. coordinates: (R, L)."""
    queries = Coordinates(*(c[:, :, None] for c in coordinates))
    keys = Coordinates(*(c[:, None, :] for c in coordinates))
    return attends(queries, keys)[:, None]


def block_mask(coordinates: Coordinates) -> "BlockMask":
    """The same rule as a BlockMask of whole tiles, evaluated from the coordinates in those that are mixed.

    coordinates: (R, L). Padding makes up for what L lacks, so that what is compiled meets few lengths. It is made
    without being compiled itself, and without ever holding all L × L pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # Padding has a strip of its own, which no token of another sees.
    padding = (0, -coordinates.strip.shape[1] % TILE)
    strip, *rest_of_token = (c.int() for c in coordinates)
    padded = Coordinates(pad(strip, padding, value=PADDING), *(pad(c, padding) for c in rest_of_token))

    def rule(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query = Coordinates(*(c[row, q] for c in padded))
        key = Coordinates(*(c[row, k] for c in padded))
        return attends(query, key)

    # Tiles that are seen in whole need no rule, tiles that are not seen no work.
    seen = seen_in_tiles(padded)
    full = seen == TILE**2
    mixed = (seen > 0) & ~full
    return BlockMask.from_kv_blocks(*tile_order(mixed), *tile_order(full), BLOCK_SIZE=TILE, mask_mod=rule)


def seen_in_tiles(coordinates: Coordinates) -> Tensor:
    """Count the pairs of a query and a key that it sees in each pair of tiles: (R, T, T). coordinates: (R, L)."""
    rows, length = coordinates.strip.shape
    keys = Coordinates(*(c[:, None, :] for c in coordinates))
    # So many tiles of queries at a time that no more than PAIRS are held.
    queries_at_once = max(PAIRS // (rows * length * TILE), 1) * TILE

    counts = []
    for chunk in zip(*(c.split(queries_at_once, 1) for c in coordinates), strict=True):
        queries = Coordinates(*(c[:, :, None] for c in chunk))
        seen = attends(queries, keys)  # (R, some of L, L)
        tiles = seen.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))  # (R, some of T, 128, T, 128)
        counts.append(tiles.sum((2, 4)))
    return torch.cat(counts, 1)


def tile_order(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles as a BlockMask has them: how many each tile of queries takes, and all of them, those that it takes first.

    tiles: (R, T, T) bool, which tiles of keys each tile of queries takes. Returns (R, 1, T) and (R, 1, T, T).
    """
    tiles = tiles[:, None].int()
    counts = tiles.sum(-1, dtype=torch.int32)
    return counts, tiles.argsort(dim=-1, descending=True, stable=True).int()


def attention_mask(rows: Rows, implementation: str, dtype: torch.dtype) -> "Tensor | BlockMask":
    """The mask in the form that the model's attention implementation takes. dtype: of the queries.

    A BlockMask is made once for each device, and shared by rows with the same coordinates.
    """
    if implementation == "flex_attention":
        device = rows.token_ids.device
        if device not in rows.block_masks:
            rows.block_masks[device] = block_mask(rows.coordinates)
        return rows.block_masks[device]

    seen = dense_mask(rows.coordinates)
    # SDPA would turn bools into these numbers once per layer, and backpropagation keep them all
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def attention_inputs(rows: Rows, implementation: str, dtype: torch.dtype, is_compiled: bool) -> dict[str, Any]:
    """What a decoder is called with, so that its layers attend by the rule. dtype: of the queries.

    Tiles are for wide rows where no layer is compiled, since code made for some tiles has no use for others. Nothing is
    timed, so that a run repeats itself.
    """
    if implementation == TILES and rows.token_ids.shape[1] > DENSE_TOKENS and not is_compiled:
        # Decoders pass on a mask of four dimensions as it is, and would make a causal one of none.
        no_mask = torch.empty(1, 1, 1, 0)
        return {"attention_mask": no_mask, "tiles": attention_tiles(rows.coordinates, dtype)}
    return {"attention_mask": attention_mask(rows, implementation, dtype)}


def hidden_states(model: PreTrainedModel, rows: Rows, context: ContextGroup = UNDIVIDED) -> Tensor:
    """The decoder's last hidden states under the attention rule: (R, L, D), or of this process's slices alone.

    Where a context divides rows, they are as wide as `padded` makes them.
    Raises DirlError for a gradient through FlexAttention on a CPU.
    """
    implementation = model.config._attn_implementation
    length = rows.token_ids.shape[1]
    device = rows.token_ids.device.type
    padding = (0, 0)
    if implementation == "flex_attention":
        if torch.is_grad_enabled() and device == "cpu":
            raise DirlError("attention=flex cannot learn on a CPU: leave it at auto")
        padding = (0, -length % TILE)  # as `block_mask` pads coordinates

    # The queries come in the dtype of the forward, and SDPA wants its mask in theirs.
    dtype = model.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    decoder = model.get_decoder()
    is_compiled = any(module._compiled_call_impl for module in decoder.modules())
    inputs = attention_inputs(rows, implementation, dtype, is_compiled)
    if context.size > 1:
        inputs["context"] = context
    output = decoder(
        input_ids=context.slice_of(pad(rows.token_ids, padding)),
        position_ids=context.slice_of(pad(rows.position, padding)),
        use_cache=False,
        **inputs,
    )
    return output.last_hidden_state[:, :length]


def states_at(
    model: PreTrainedModel, rows: Rows, context: ContextGroup, shifted: bool = False
) -> tuple[Tensor, Tensor | slice]:
    """The hidden states that predict this process's scored tokens, and which of the N these are: (n, D) and (n,).

    shifted: whether a token is predicted where the one before it stands.
    """
    if context.size > 1:
        rows = padded(rows, context, model.config._attn_implementation)
    index = rows.shifted_index if shifted else rows.target_index
    hidden = hidden_states(model, rows, context).flatten(0, 1)
    if context.size == 1:
        return hidden[index], slice(None)
    own, place = context.own_tokens(index, rows.token_ids.shape[1])
    return hidden[place], own


def padded(rows: Rows, context: ContextGroup, implementation: str) -> Rows:
    """The rows as wide as it takes to divide them into equal slices."""
    multiple = context.size
    if implementation == "flex_attention":
        multiple = math.lcm(context.size, TILE)
    return pad_rows(rows, multiple)
