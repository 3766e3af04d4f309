"""Forwards in plain torch, for any device: what a slot has not cached yet goes in with the block it denoises."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from dirl_cli.models.kv_cache import SLOTS, Attend, KVCache
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.low_precision import inference_model
from dirl_cli.rollout.reveal import Canvas, Revealer

Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]


def slot_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model as `decode` takes it, whatever attention it was loaded with. It follows the weights of `model`."""
    return inference_model(model, SLOTS)


def one_before(hidden: Tensor, edge: Tensor) -> Tensor:
    """For each token of some blocks the hidden state of the token before it. hidden: (N, B, D). edge: (N, D)."""
    return torch.cat([edge[:, None], hidden[:, :-1]], 1)


def decode(
    model: PreTrainedModel, cache: KVCache, token_ids: Tensor, position: Tensor, places: Tensor, attend: Attend
) -> Tensor:
    """Hidden states (T, D) of tokens at `places`, each slot * length + position: (T,) all.

    model: one of `slot_model`.
    """
    output = model.get_decoder()(
        input_ids=token_ids[None],
        position_ids=position[None],
        past_key_values=cache.at(places),
        use_cache=False,
        attend=attend,
    )
    return output.last_hidden_state[0]


@dataclass(frozen=True)
class Group:
    """Slots with equally many tokens in a forward, side by side in its packed row.

    slots: ascending. used: cached positions that any of them sees. mask: (slots, 1, width or 1, used), None for all.
    """

    slots: Integers
    width: int
    used: int
    mask: Tensor | None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """See `decoder.Attend`; query: (slots * width, heads, D)."""
        count, (_, heads, size), mask = len(self.slots), query.shape, self.mask
        key_heads = keys.shape[2]
        query = query.unflatten(0, (count, self.width)).transpose(1, 2)
        query = query.reshape(count, key_heads, -1, size)  # the query heads of a key head as more of its queries
        if mask is not None and mask.shape[2] > 1 and heads > key_heads:
            mask = mask.repeat(1, 1, heads // key_heads, 1)
        seen, known = self._seen(keys), self._seen(values)
        found = nn.functional.scaled_dot_product_attention(query, seen, known, mask, scale=scale)
        return found.reshape(count, heads, self.width, size).transpose(1, 2).flatten(0, 1)

    def _seen(self, kept: Tensor) -> Tensor:
        """(slots, key heads, used, D)."""
        first, last = int(self.slots[0]), int(self.slots[-1])
        if last - first < len(self.slots):  # neighbours need no copy
            return kept[first : last + 1, : self.used].transpose(1, 2)
        return kept[torch.from_numpy(self.slots).to(kept.device), : self.used].transpose(1, 2)


class Runs:
    """Slots whose forwards are one packed row, in which each has a run of tokens, from what it has cached on."""

    def __init__(self, lm: DiffusionLM, slots: int, length: int) -> None:
        self.lm, self.length = lm, length
        self.model = slot_model(lm.model)
        self.canvas = Canvas(lm, slots, length)
        self.cache = KVCache(slots, length)
        self.offsets = np.arange(lm.block_size)
        self.edge = torch.empty(0)  # (slots, D) of the last token of each slot that is cached

    def step(self, blocks: Integers, cached: Integers, count: int, reveal: Revealer) -> Integers:
        """See `Forwards.step`."""
        order = (blocks[1] - cached).argsort(kind="stable")
        blocks, cached = blocks[:, order], cached[order]
        hidden = self._forward(blocks[0], blocks[1], cached)
        shown = reveal(self.canvas, self._upload(blocks), hidden, count)
        return shown.cpu().numpy()[order.argsort()]

    def _forward(self, slots: Integers, start: Integers, cached: Integers) -> Tensor:
        """Hidden states of the last block of each run, which are as long or longer than those before: (N * B, D)."""
        width = start + len(self.offsets) - cached
        end = width.cumsum()
        position = np.arange(end[-1]) + (cached + width - end).repeat(width)
        row = self._upload(np.stack([position, position + (slots * self.length).repeat(width)]))
        groups = self._groups(slots, cached, width)

        def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
            if len(groups) == 1:
                return groups[0].attend(query, keys, values, scale)
            parts = query.split([len(one.slots) * one.width for one in groups])
            return torch.cat([one.attend(q, keys, values, scale) for one, q in zip(groups, parts, strict=True)])

        hidden = decode(self.model, self.cache, self.canvas.tokens.take(row[1]), row[0], row[1], attend)
        size = len(self.offsets)
        blocks = hidden
        if len(hidden) > len(slots) * size:
            blocks = hidden[self._upload((end[:, None] - size + self.offsets).ravel())]
        return self._one_before(hidden, blocks, slots, end - size, width > size) if self.lm.logit_shift else blocks

    def _one_before(self, hidden: Tensor, blocks: Tensor, slots: Integers, begin: Integers, fresh: Bools) -> Tensor:
        """The hidden states of the tokens before those of the blocks.

        The one before a block was computed when that was cached: in this forward where it is `fresh`, or earlier.
        """
        if not len(self.edge):
            self.edge = hidden.new_zeros(len(self.canvas.tokens), hidden.shape[1])
        self.edge[self._upload(slots[fresh])] = hidden[self._upload(begin[fresh] - 1)]
        states = blocks.unflatten(0, (len(slots), -1))
        return one_before(states, self.edge[self._upload(slots)]).flatten(0, 1)

    def _groups(self, slots: Integers, cached: Integers, width: Integers) -> list[Group]:
        """By width, which is ascending."""
        groups = []
        borders = [0, *(np.flatnonzero(width[1:] != width[:-1]) + 1), len(slots)]
        for part in map(slice, borders, borders[1:]):
            start, tokens, size = cached[part], int(width[part.start]), len(self.offsets)
            used = int(start.max()) + tokens
            mask = None
            if tokens > size or start.min() < used - tokens:
                ends = start[:, None] + np.arange(size, tokens + 1, size).repeat(size if tokens > size else 1)
                mask = self._upload(np.arange(used) < ends[:, None, :, None])
            groups.append(Group(slots[part], tokens, used, mask))
        return groups

    def _upload(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.lm.device)
