"""What a forward is to the scheduler, and forwards in plain torch for any device.

What a slot has not cached yet goes in with the block it denoises.

Shapes: S slots, N blocks of B tokens in a forward (one a running slot), T tokens in its packed row, D hidden size,
H query heads, K key heads, E head size.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dirl_cli.models.kv_cache import KVCache
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.decoder import Decoder
from dirl_cli.rollout.pages import Integers, PageTable
from dirl_cli.rollout.sequences import MixedUnmasker, SequenceState, Unmasker

Bools = NDArray[np.bool_]


class Forward(Protocol):
    """The slots of a model and its forwards of them: `EagerForward`, or `GraphForward` of forward_gpu.py."""

    lm: DiffusionLM
    decoder: Decoder
    sequences: SequenceState
    cache: KVCache
    pages: PageTable

    def step(
        self, blocks: Integers, cached: Integers, count: int, unmask: Unmasker | MixedUnmasker, reads: bool = True
    ) -> Integers | None:
        """Reveal some tokens of N blocks, first computing what their slots have not cached yet.

        Their slots have pages up to the end of these blocks.
        blocks: (4, N): slot (ascending), first position, denoising step from 1, request's key.
        cached: (N,) positions of each slot whose keys and values are final, whole blocks.
        count: tokens still masked in all blocks, or more.
        reads: whether to wait for the tokens.
        Returns them, -1 where still masked: (N, B); or None.
        """
        ...


def previous_states(hidden: Tensor, edge: Tensor) -> Tensor:
    """For each token of N blocks the hidden state of the token before it, which predicts it under a logit shift.

    hidden: (N, B, D). edge: (N, D), of the token before each block. Returns (N, B, D).
    """
    return torch.cat([edge[:, None], hidden[:, :-1]], 1)


@dataclass(frozen=True)
class EqualWidthSlots:
    """n slots with equally many tokens in a forward, side by side in its packed row: one call of attention.

    pages: (n, P) page numbers of what these see; a slice where each lies in one page and these are neighbours.
    width: tokens of each. used: the cached positions that any of them sees.
    mask: (n, 1, width or 1, used) bool, the latter where all tokens of a slot see the same; None where all see all.
    """

    count: int
    pages: Tensor | slice
    width: int
    used: int
    mask: Tensor | None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """See `kv_cache.Attend`. query: (n * width, H, E). keys, values: (pages, page_size, K, E)."""
        _, heads, size = query.shape
        key_heads = keys.shape[2]

        # The H / K query heads of a key head count as more queries of it, so that keys are not repeated.
        query = query.unflatten(0, (self.count, self.width)).transpose(1, 2)  # (n, H, width, E)
        query = query.reshape(self.count, key_heads, -1, size)  # (n, K, H / K * width, E)
        mask = self.mask
        if mask is not None and mask.shape[2] > 1 and heads > key_heads:
            mask = mask.repeat(1, 1, heads // key_heads, 1)

        attended = nn.functional.scaled_dot_product_attention(
            query, self._of_slots(keys), self._of_slots(values), mask, scale=scale
        )
        return attended.reshape(self.count, heads, self.width, size).transpose(1, 2).flatten(0, 1)

    def _of_slots(self, cached: Tensor) -> Tensor:
        """The used part of a layer's keys or values. cached: (pages, page_size, K, E). Returns (n, K, used, E)."""
        if isinstance(self.pages, slice):  # which needs no copy
            return cached[self.pages, : self.used].transpose(1, 2)
        of_slots = cached[:, : self.used][self.pages]  # (n, P, page_size or less, K, E)
        return of_slots.flatten(1, 2)[:, : self.used].transpose(1, 2)


class EagerForward:
    """See `Forward`: one packed row a forward, with each slot's tokens from what it has cached on.

    page_size, pages: of the KV cache. By default each slot has a page of its own, as long as the longest sequence:
    attention then reads keys and values where they are, which counts on a CPU, while smaller pages are copied together.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        decoder: Decoder,
        slots: int,
        length: int,
        page_size: int | None = None,
        pages: int | None = None,
        record_entropy: bool = False,
    ) -> None:
        self.lm = lm
        self.device = lm.device
        self.decoder = decoder
        self.length = length
        self.sequences = SequenceState(lm, slots, length, record_entropy)
        self.pages = PageTable(slots, length, page_size or length, pages)
        self.cache = KVCache(self.pages.count, self.pages.size, length)
        self.offsets = np.arange(lm.block_size)
        self.edge = torch.empty(0)  # (S, D) of the last token of each slot that is cached, under a logit shift

    def step(
        self, blocks: Integers, cached: Integers, count: int, unmask: Unmasker | MixedUnmasker, reads: bool = True
    ) -> Integers | None:
        """See `Forward.step`."""
        self.sequences.send_opened()

        # By the number of tokens, so that slots of equal width are neighbours, and by their pages, which may be, too.
        order = np.lexsort((self.pages.rows[blocks[0], 0], blocks[1] - cached))
        blocks, cached = blocks[:, order], cached[order]
        hidden = self._forward(blocks[0], blocks[1], cached)
        tokens = unmask(self.sequences, self._upload(blocks), hidden, count)
        return tokens.cpu().numpy()[order.argsort()] if reads else None

    def _forward(self, slots: Integers, start: Integers, cached: Integers) -> Tensor:
        """Hidden states that predict the current block of each slot: (N * B, D). All (N,), fewest tokens first."""
        size = len(self.offsets)

        # Slots stand one after another in the row, each with its tokens from `cached` to the end of its block.
        width = start + size - cached
        end = width.cumsum()  # in the packed row
        position = np.arange(end[-1]) + (cached + width - end).repeat(width)  # (T,)
        slot = slots.repeat(width)
        page = self.pages.rows[slot, position // self.pages.size]
        cache_index = page * self.pages.size + position % self.pages.size
        row = self._upload(np.stack([position, slot * self.length + position, cache_index]))
        groups = self._groups(slots, cached, width)

        def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
            if len(groups) == 1:
                return groups[0].attend(query, keys, values, scale)
            queries = query.split([group.count * group.width for group in groups])
            attended = [group.attend(q, keys, values, scale) for group, q in zip(groups, queries, strict=True)]
            return torch.cat(attended)

        hidden = self.decoder(self.cache, self.sequences.tokens.take(row[1]), row[0], row[2], attend)

        # Where more than the current blocks was computed, these are the last tokens of each slot.
        blocks = hidden
        if len(hidden) > len(slots) * size:
            blocks = hidden[self._upload((end[:, None] - size + self.offsets).ravel())]
        if self.lm.logit_shift:
            return self._previous_states(hidden, blocks, slots, end - size, width > size)
        return blocks

    def _previous_states(
        self, hidden: Tensor, blocks: Tensor, slots: Integers, begin: Integers, fresh: Bools
    ) -> Tensor:
        """Hidden states of the tokens before those of the current blocks: (N * B, D).

        The one before a block was computed when that token was cached: in this forward where it is `fresh`, or earlier.
        hidden: (T, D). blocks: (N * B, D), those of the current blocks. begin: (N,), where these begin in the row.
        """
        if not len(self.edge):
            self.edge = hidden.new_zeros(len(self.sequences.tokens), hidden.shape[1])
        self.edge[self._upload(slots[fresh])] = hidden[self._upload(begin[fresh] - 1)]
        states = blocks.unflatten(0, (len(slots), -1))
        return previous_states(states, self.edge[self._upload(slots)]).flatten(0, 1)

    def _groups(self, slots: Integers, cached: Integers, width: Integers) -> list[EqualWidthSlots]:
        """The slots by width, which is ascending. All (N,)."""
        size = len(self.offsets)
        groups = []
        borders = [0, *(np.flatnonzero(width[1:] != width[:-1]) + 1), len(slots)]
        for first, last in pairwise(borders):
            start = cached[first:last]
            tokens = int(width[first])
            used = int(start.max()) + tokens
            mask = None
            if tokens > size or start.min() < used - tokens:
                # A token sees its slot up to the end of its own block.
                ends = start[:, None] + np.arange(size, tokens + 1, size)  # (n, blocks)
                if tokens > size:
                    ends = ends.repeat(size, axis=1)  # (n, tokens)
                mask = self._upload(np.arange(used) < ends[:, None, :, None])
            groups.append(EqualWidthSlots(last - first, self._pages(slots[first:last], used), tokens, used, mask))
        return groups

    def _pages(self, slots: Integers, used: int) -> Tensor | slice:
        """The pages in which the first `used` positions of some slots lie: see `EqualWidthSlots`."""
        pages = self.pages.rows[slots, : self.pages.pages_of(used)]  # (n, P)
        if pages.shape[1] == 1:
            first, last = int(pages[0, 0]), int(pages[-1, 0])  # ascending
            if last - first < len(slots):
                return slice(first, last + 1)
        return self._upload(pages)

    def _upload(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)
