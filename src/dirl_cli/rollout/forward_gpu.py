"""Forwards for a GPU: packed rows of blocks, unpadded and without a mask, from CUDA graphs.

Whether a block is part of a prompt, is to be cached or is being denoised makes no difference: it writes its keys and
values to its slot and sees all of the slot up to its own end.
"""

from collections.abc import Callable, Hashable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from dirl_cli.models.kv_cache import KVCache
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.forward import Integers, decode, one_before, slot_model
from dirl_cli.rollout.reveal import Canvas, Revealer
from dirl_cli.types import Decoding

PREFILL = 16384  # tokens of prompts in one forward

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
Replay = Callable[[Hashable, Callable[[], None]], None]


def block_attention(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Attention of N blocks, each on its slot up to its end; returns (N * B, heads, D).

    query: (N * B, heads, D). keys, values: (slots, length, key heads, D). slots, ends: (N,).
    """
    query = query.unflatten(0, (len(slots), -1)).transpose(1, 2)
    seen, known = (kept[slots].transpose(1, 2) for kept in (keys, values))
    mask = torch.arange(keys.shape[1], device=ends.device) < ends[:, None, None, None]
    found = nn.functional.scaled_dot_product_attention(query, seen, known, mask, scale=scale, enable_gqa=True)
    return found.transpose(1, 2).flatten(0, 1)


def at_once(size: Hashable, work: Callable[[], None]) -> None:
    """Replays nothing: what a device without graphs does."""
    work()


class Graphs:
    """Replays work on tensors that stay in place: the first time of a size as it is, then from a CUDA graph."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, size: Hashable, work: Callable[[], None]) -> None:
        if size not in self.graphs:
            self.graphs[size] = None
            work()  # compiles kernels, which a capture cannot
            return
        graph = self.graphs[size] = self.graphs[size] or self._capture(work)
        graph.replay()

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        capturing = torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local")  # other threads may go on
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False), capturing:
            work()
        return graph


class Blocks:
    """Slots on a GPU. All that a graph reads or writes stays where it is as long as this lives."""

    def __init__(self, lm: DiffusionLM, slots: int, length: int, attention: Attention, replay: Replay) -> None:
        self.lm, self.slots, self.length = lm, slots, length
        self.model = slot_model(lm.model)
        self.attention, self.replay = attention, replay
        self.canvas = Canvas(lm, slots + 1, length)  # the spare slot is for blocks that only fill a graph
        self.cache = KVCache(slots + 1, length)
        self.offsets = torch.arange(lm.block_size, device=lm.device)
        # of each block its slot, first position, step, request's key, and the slot whose cached tokens it is to end
        self.host = torch.zeros(5, 2 * slots, dtype=torch.long, pin_memory=lm.device.type == "cuda")
        self.blocks = self.host.to(lm.device)
        self.shown = torch.empty(slots, lm.block_size, dtype=torch.long, device=lm.device)
        self.hidden = torch.empty(0)
        self.edge = torch.empty(0)  # (slots + 1, D) of the last token of each slot that is cached
        self.revealers: dict[Decoding, Revealer] = {}

    def step(self, blocks: Integers, cached: Integers, count: int, reveal: Revealer) -> Integers:
        """See `Forwards.step`."""
        cached = self._prefill(blocks, cached)
        finished = blocks[:, blocks[1] > cached] - np.array([0, self.lm.block_size, 0, 0])[:, None]
        opened, used = blocks.shape[1], blocks.shape[1] + finished.shape[1]
        self.host[0] = self.host[4] = self.slots
        self.host[:4, :used] = torch.from_numpy(np.concatenate([blocks, finished], 1))
        self.host[4, opened:used] = self.host[0, opened:used]
        self.blocks.copy_(self.host, non_blocking=True)
        size = min(bucket(used), 2 * self.slots)
        self.replay(size, partial(self._forward, size))
        if reveal.is_built_in:
            count = min(bucket(count), self.slots * self.lm.block_size)
            reveal = self.revealers.setdefault(reveal.decoding, reveal)  # a graph reads tensors of its own
            self.replay((count, reveal.decoding), partial(self._reveal, reveal, count))
        else:
            self._reveal(reveal, count)
        return self.shown[: blocks.shape[1]].cpu().numpy()

    def _prefill(self, blocks: Integers, cached: Integers) -> Integers:
        """Cache the prompts of slots that have more than a block to cache, but for the last; returns what is cached."""
        slot, start, size = blocks[0], blocks[1], self.lm.block_size
        missing = np.maximum((start - cached) // size - 1, 0)
        number = np.arange(missing.sum()) - (missing.cumsum() - missing).repeat(missing)
        rows = np.stack([slot.repeat(missing), cached.repeat(missing) + number * size])
        for part in torch.from_numpy(rows).to(self.lm.device).split(PREFILL // size, dim=1) if rows.size else ():
            self._decode(*part)
        return cached + missing * size

    def _forward(self, size: int) -> None:
        """Decode the first `size` blocks."""
        hidden = self._decode(*self.blocks[:2, :size])
        if not len(self.hidden):
            self.hidden = hidden.new_zeros(self.slots * self.lm.block_size, hidden.shape[1])
            self.edge = hidden.new_zeros(self.slots + 1, hidden.shape[1])
        if self.lm.logit_shift:
            states = hidden.unflatten(0, (size, -1))
            self.edge[self.blocks[4, :size]] = states[:, -1]
            hidden = one_before(states, self.edge[self.blocks[0, :size]]).flatten(0, 1)
        opened = hidden[: len(self.hidden)]
        self.hidden[: len(opened)] = opened

    def _decode(self, slots: Tensor, start: Tensor) -> Tensor:
        position = start[:, None] + self.offsets
        places = (slots[:, None] * self.length + position).flatten()

        def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
            return self.attention(query, keys, values, slots, start + self.lm.block_size, scale)

        return decode(self.model, self.cache, self.canvas.tokens.take(places), position.flatten(), places, attend)

    def _reveal(self, reveal: Revealer, count: int) -> None:
        self.shown.copy_(reveal(self.canvas, self.blocks[:4, : self.slots], self.hidden, count))


def bucket(count: int) -> int:
    """The least size from `count` on that has a graph: few enough to capture, a quarter of padding at most."""
    step = 1 << max((count - 1).bit_length() - 3, 0)
    return -(-count // step) * step
