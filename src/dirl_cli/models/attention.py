"""The attention rule as what transformers takes: a dense mask for SDPA, a BlockMask for FlexAttention."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dirl_cli.diffusion.layout import Coordinates, Rows, attends
from dirl_cli.errors import DirlError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def dense_mask(coordinates: Coordinates) -> Tensor:
    """(R, 1, L, L) bool, true where a query may look. coordinates: (R, L)."""
    queries = Coordinates(*(c[:, :, None] for c in coordinates))
    keys = Coordinates(*(c[:, None, :] for c in coordinates))
    return attends(queries, keys)[:, None]


def block_mask(coordinates: Coordinates) -> "BlockMask":
    """The same rule as a BlockMask, evaluated from the coordinates tile by tile. coordinates: (R, L)."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attends(Coordinates(*(c[row, q] for c in coordinates)), Coordinates(*(c[row, k] for c in coordinates)))

    rows, length = coordinates.group.shape
    device = coordinates.group.device
    return create_block_mask(rule, rows, None, length, length, device=str(device), _compile=device.type == "cuda")


def attention_mask(rows: Rows, implementation: str, dtype: torch.dtype) -> "Tensor | BlockMask":
    """What the model's attention implementation takes as its mask. dtype: that of the queries."""
    if implementation == "flex_attention":
        return block_mask(rows.coordinates)
    seen = dense_mask(rows.coordinates)
    # SDPA would turn bools into these numbers once per layer, and backpropagation keep them all
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def hidden_states(model: PreTrainedModel, rows: Rows) -> Tensor:
    """The decoder's last hidden states under the attention rule: (R, L, D)."""
    implementation = model.config._attn_implementation
    if implementation == "flex_attention" and torch.is_grad_enabled() and rows.token_ids.device.type == "cpu":
        raise DirlError("attention=flex cannot learn on a CPU: leave it at auto")
    device = rows.token_ids.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    output = model.get_decoder()(
        input_ids=rows.token_ids,
        position_ids=rows.position,
        attention_mask=attention_mask(rows, implementation, dtype),
        use_cache=False,
    )
    return output.last_hidden_state


@contextmanager
def dense_attention(model: PreTrainedModel) -> Iterator[None]:
    """Forwards inside take a dense mask, whatever attention the model was loaded with."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = before
