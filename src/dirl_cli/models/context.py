"""Context parallelism: rows divided among processes, for answers that are longer than one GPU holds.

Each process of a group computes its slice of every row. In attention it has all tokens of its share of the heads
instead, so that any mask is exact (DeepSpeed-Ulysses, arXiv 2309.14509; torch's own ring wants a causal one). What
comes of the scored tokens is gathered, so that a loss sees whole rows.

Shapes: P processes; R rows of L tokens, S = L / P of them in a slice; H heads of queries, K of keys, D values of a
head; N scored tokens, n of them in this process's slices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as collectives  # those that torch.compile knows
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dirl_cli.diffusion.layout import PADDING, PER_TOKEN, Rows
from dirl_cli.errors import DirlError
from dirl_cli.models.attention_cpu import TILES

Attend = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class ContextGroup:
    """The processes that divide rows among them, by torch's name of their group, and which of them this is."""

    name: Any  # a str, of a type of torch's own
    size: int
    index: int

    def slice_of(self, rows: Tensor) -> Tensor:
        """This process's tokens: (R, S) from (R, L)."""
        return rows.chunk(self.size, 1)[self.index]

    def own_tokens(self, index: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Which of some tokens are this process's, and where they stand in its flattened slices: (n,) each.

        index: (N,) where they stand in the flattened rows, of `width` tokens each.
        """
        own_width = width // self.size
        own = (index % width // own_width == self.index).nonzero().squeeze(1)
        return own, index[own] // width * own_width + index[own] % own_width

    def gather(self, values: Tensor, own: Tensor | slice, count: int) -> Tensor:
        """What each process has of its own scored tokens, of all of them: (N,) from (n,). own: which they are."""
        if self.size == 1:
            return values
        gathered: Tensor = Gather.apply(values, own, count, self.name)
        return gathered


UNDIVIDED = ContextGroup("", 1, 0)


class Gather(torch.autograd.Function):
    """All processes compute the same loss of what is gathered, which counts once: each takes its part's gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, own: Tensor, count: int, group: Any) -> Tensor:
        ctx.save_for_backward(own)
        whole = values.new_zeros(count).index_copy_(0, own, values)
        return collectives.wait_tensor(collectives.all_reduce(whole, "sum", group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return gradient[own], None, None, None


def pad_rows(rows: Rows, multiple: int) -> Rows:
    """The same rows, as wide as the next multiple: what is added is padding."""
    width = rows.token_ids.shape[1]
    added = -width % multiple
    columns: dict[str, Any] = {}
    for name in PER_TOKEN:
        columns[name] = pad(getattr(rows, name), (0, added), value=PADDING if name == "strip" else 0)

    def moved(index: Tensor) -> Tensor:
        return index // width * (width + added) + index % width

    return replace(rows, **columns, target_index=moved(rows.target_index), shifted_index=moved(rows.shifted_index))


def require_shared_heads(config: PreTrainedConfig, size: int) -> None:
    """Raises DirlError where so many processes cannot have as many heads of attention each."""
    heads = config.num_attention_heads
    if heads % size:
        raise DirlError(
            f"context_parallel={size} shares out the {heads} heads of the model's attention, which are no multiple of"
            f" it: give one of {', '.join(str(n) for n in range(2, heads + 1) if heads % n == 0)}"
        )


class AttentionLayer(NamedTuple):
    """What attention functions ask of the layer that they are called for."""

    training: bool
    num_key_value_groups: int


def divided(attend: Attend) -> Attend:
    """An attention function that divides rows where the caller of the model gives a `context`; else it is as it was."""

    def attend_divided(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        context: ContextGroup = UNDIVIDED,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query: (R, H, S, D). key, value: (R, K, S, D). Returns (R, S, H, D)."""
        if context.size == 1:
            return attend(module, query, key, value, *args, **kwargs)
        copies = context.size // math.gcd(context.size, key.shape[1])  # so that every process has heads of keys
        # Queries and keys may still be in fp32 where attention will cast them: half of it need not travel.
        query = trade(query.to(value.dtype), context)
        key = trade(key.to(value.dtype).repeat_interleave(copies, 1), context)
        value = trade(value.repeat_interleave(copies, 1), context)
        layer = AttentionLayer(module.training, query.shape[1] // key.shape[1])
        output, _ = attend(layer, query, key, value, *args, **kwargs)  # (R, L, H / P, D)
        return trade(output, context), None

    return attend_divided


def trade(part: Tensor, context: ContextGroup) -> Tensor:
    """Give all but a share of one dimension for all of the next: (R, a / P, b, D) of all from (R, a, b / P, D).

    From a slice of the tokens of all heads to all tokens of a share of the heads, and of attention's output, whose
    tokens stand before its heads, back.
    """
    parts = torch.stack(part.chunk(context.size, 1))  # (P, R, a / P, b / P, D), one for each process
    received = collectives.all_to_all_single_autograd(parts, None, None, context.name)
    return torch.cat(collectives.wait_tensor(received).unbind(), 2)


for name in ("sdpa", "flex_attention", TILES):
    AttentionInterface.register(name, divided(ALL_ATTENTION_FUNCTIONS[name]))
