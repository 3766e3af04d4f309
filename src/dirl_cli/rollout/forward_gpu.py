"""Forwards for a GPU: packed rows of blocks, unpadded and without a mask, from CUDA graphs.

Whether a block is part of a prompt, is to be cached or is being denoised makes no difference: it writes its keys and
values to the pages of its slot and sees all of the slot up to its own end.

Shapes: S slots and one spare, P pages of the longest sequence, N blocks of B tokens in a forward, D hidden size, H
query heads, K key heads, E head size.
"""

from collections.abc import Callable, Hashable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from dirl_cli.models.kv_cache import KVCache
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.decoder import Decoder
from dirl_cli.rollout.forward import previous_states
from dirl_cli.rollout.pages import Integers, PageTable
from dirl_cli.rollout.sequences import MixedUnmasker, SequenceState, Unmasker, upload
from dirl_cli.types import Decoding

PREFILL = 16384  # tokens of prompts in one forward
RIDERS = 512  # tokens that a replayed forward has room for at least: few enough to cost little more than none
RULES = 16  # of drawing and revealing that have graphs
PAGE = 32  # tokens of a page, or as many more as make whole blocks: half of one is wasted by each answer

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""Such as `block_attention`."""

Replay = Callable[[Hashable, Callable[[], None]], None]
"""Does the work for a key, which says all that the work's shapes depend on: `run_eagerly` or a `GraphCache`."""


def page_size(block_size: int) -> int:
    """Tokens of a page: whole blocks."""
    return -(-PAGE // block_size) * block_size


def block_attention(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, slots: Tensor, ends: Tensor, scale: float
) -> Tensor:
    """Attention of N blocks, each on its slot up to its end; returns (N * B, H, E).

    query: (N * B, H, E). keys, values: (pages, page_size, K, E). table: (S + 1, P) pages of each slot.
    slots, ends: (N,).
    """
    query = query.unflatten(0, (len(slots), -1)).transpose(1, 2)  # (N, H, B, E)
    pages = table[slots]  # (N, P)
    slot_keys = keys[pages].flatten(1, 2).transpose(1, 2)  # (N, K, length, E)
    slot_values = values[pages].flatten(1, 2).transpose(1, 2)
    mask = torch.arange(slot_keys.shape[2], device=ends.device) < ends[:, None, None, None]
    attended = nn.functional.scaled_dot_product_attention(
        query, slot_keys, slot_values, mask, scale=scale, enable_gqa=True
    )
    return attended.transpose(1, 2).flatten(0, 1)


def run_eagerly(key: Hashable, work: Callable[[], None]) -> None:
    """Do the work and replay nothing: for devices without graphs."""
    work()


class GraphCache:
    """Replays work on tensors that stay in place: the first time for a key eagerly, then from a CUDA graph."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        if key not in self.graphs:
            self.graphs[key] = None
            work()  # compiles kernels, which a capture cannot
            return
        graph = self.graphs[key] = self.graphs[key] or self._capture(work)
        graph.replay()

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        dtype = torch.get_autocast_dtype("cuda")
        enabled = torch.is_autocast_enabled("cuda")
        capturing = torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local")  # other threads may go on
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False), capturing:
            work()
        return graph


class GraphForward:
    """See `forward.Forward`: forwards of whole blocks, replayed by size.

    All that a graph reads or writes stays where it is as long as this lives. attention: `block_attention` or what
    computes the same. replay: see `Replay`. pages: of the KV cache; None for as many as all slots may take.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        decoder: Decoder,
        slots: int,
        length: int,
        attention: Attention,
        replay: Replay,
        pages: int | None = None,
        record_entropy: bool = False,
    ) -> None:
        self.lm = lm
        self.decoder = decoder
        self.slots = slots
        self.length = length
        self.attention = attention
        self.replay = replay
        # The spare slot is for blocks that only fill a graph.
        self.sequences = SequenceState(lm, slots + 1, length, record_entropy)
        self.pages = PageTable(slots, length, page_size(lm.block_size), pages)
        self.cache = KVCache(self.pages.count + 1, self.pages.size, length)  # and a page for the spare slot
        self.offsets = torch.arange(lm.block_size, device=lm.device)

        # The pages of each slot, on the device and on the way there.
        rows = torch.full((slots + 1, self.pages.longest), self.pages.count)
        self.host_table = rows.pin_memory() if lm.device.type == "cuda" else rows
        self.table = rows.to(lm.device, copy=True)

        # Of each block its slot, first position, step, request's key, and the slot whose cached tokens it is to end.
        # A forward has room for two blocks a slot, the one that is denoised and the one before, which is to be cached.
        self.room = max(2 * slots, RIDERS // lm.block_size)
        self.host = torch.zeros(5, self.room, dtype=torch.long, pin_memory=lm.device.type == "cuda")
        self.blocks = self.host.to(lm.device)
        self.sent = torch.cuda.Event() if lm.device.type == "cuda" else None  # what is on the host is on the device
        self.tokens = torch.empty(slots, lm.block_size, dtype=torch.long, device=lm.device)  # -1 where masked
        self.hidden = torch.empty(0)  # (S * B, D) that predict the blocks that are denoised
        self.edge = torch.empty(0)  # (S + 1, D) of the last token of each slot that is cached
        self.unmaskers: dict[Decoding, Unmasker] = {}

    def step(
        self, blocks: Integers, cached: Integers, count: int, unmask: Unmasker | MixedUnmasker, reads: bool = True
    ) -> Integers | None:
        """See `Forward.step`."""
        if self.sent:
            self.sent.synchronize()  # the last step may not have begun yet, and reads what is written here

        self.sequences.send_opened()
        if self.pages.changed:
            self.host_table[: self.slots] = torch.from_numpy(self.pages.rows)
            self.table.copy_(self.host_table, non_blocking=True)
            self.pages.changed = False

        # What is not cached yet goes in with the blocks that are denoised, behind them: a finished block of each slot
        # or none, and of newcomers the prompts, if there is room for them.
        opened = blocks.shape[1]
        missing = (blocks[1] - cached) // self.lm.block_size
        if opened + missing.sum() > self.room:
            cached = self._prefill(blocks[0], cached, np.maximum(missing - 1, 0))
            missing = np.minimum(missing, 1)
        finished = self._blocks_from(blocks[0], cached, missing)
        used = opened + finished.shape[1]

        # Of several blocks of a slot only the last ends its cached tokens.
        last = missing.cumsum()[missing > 0] - 1
        fields = self.host.numpy()
        fields[0] = fields[4] = self.slots  # the spare one, where nothing else is said
        fields[:4, :opened] = blocks
        fields[:2, opened:used] = finished
        fields[4, opened + last] = finished[0, last]
        self.blocks.copy_(self.host, non_blocking=True)
        if self.sent:
            self.sent.record()

        size = min(bucket(used), self.room)
        self.replay(size, partial(self._forward, size))
        if isinstance(unmask, Unmasker) and self._has_graphs(unmask):
            count = min(bucket(count), self.slots * self.lm.block_size)
            unmask = self.unmaskers.setdefault(unmask.decoding, unmask)  # a graph reads the tensors of one
            self.replay((count, unmask.decoding), partial(self._unmask, unmask, count))
        else:
            self._unmask(unmask, count)
        return self.tokens[:opened].cpu().numpy() if reads else None

    def _prefill(self, slots: Integers, cached: Integers, missing: Integers) -> Integers:
        """Cache the next `missing` blocks of each slot; returns the positions that are cached thereafter. All (N,)."""
        rows = upload(self._blocks_from(slots, cached, missing), self.lm.device)
        for piece in rows.split(PREFILL // self.lm.block_size, dim=1):
            self._decode(*piece)
        return cached + missing * self.lm.block_size

    def _blocks_from(self, slots: Integers, begin: Integers, count: Integers) -> Integers:
        """The next blocks of each slot from `begin` on, `count` of them: slots and first positions, (2, their sum)."""
        number = np.arange(count.sum()) - (count.cumsum() - count).repeat(count)  # inside its slot
        return np.stack([slots.repeat(count), begin.repeat(count) + number * self.lm.block_size])

    def _forward(self, size: int) -> None:
        """Decode the first `size` blocks and keep the hidden states of those that are denoised."""
        hidden = self._decode(*self.blocks[:2, :size])
        if not len(self.hidden):
            self.hidden = hidden.new_zeros(self.slots * self.lm.block_size, hidden.shape[1])
            self.edge = hidden.new_zeros(self.slots + 1, hidden.shape[1])
        if self.lm.logit_shift:
            states = hidden.unflatten(0, (size, -1))  # (size, B, D)
            self.edge[self.blocks[4, :size]] = states[:, -1]
            hidden = previous_states(states, self.edge[self.blocks[0, :size]]).flatten(0, 1)
        opened = hidden[: len(self.hidden)]
        self.hidden[: len(opened)] = opened

    def _decode(self, slots: Tensor, start: Tensor) -> Tensor:
        """Hidden states of whole blocks, which are cached thereby: (N * B, D). slots, start: (N,)."""
        position = (start[:, None] + self.offsets).flatten()  # (N * B,)
        token_ids = self.sequences.tokens.take((slots * self.length)[:, None] + start[:, None] + self.offsets)

        # A block lies in one page.
        size = self.pages.size
        first = self.table[slots, start // size] * size + start % size  # (N,)
        index = (first[:, None] + self.offsets).flatten()

        def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
            return self.attention(query, keys, values, self.table, slots, start + self.lm.block_size, scale)

        return self.decoder(self.cache, token_ids.flatten(), position, index, attend)

    def _has_graphs(self, unmask: Unmasker) -> bool:
        """Whether an unmasker is replayed: one that never asks the device for sizes, which a capture cannot.

        Beyond RULES of them the others are not, so that graphs do not pile up where each request brings its own.
        """
        is_known = unmask.decoding in self.unmaskers
        return unmask.is_built_in and (is_known or len(self.unmaskers) < RULES)

    def _unmask(self, unmask: Unmasker | MixedUnmasker, count: int) -> None:
        self.tokens.copy_(unmask(self.sequences, self.blocks[:4, : self.slots], self.hidden, count))


def bucket(count: int) -> int:
    """The least size from `count` on that has a graph: few enough to capture, a quarter of padding at most."""
    step = 1 << max((count - 1).bit_length() - 3, 0)
    return -(-count // step) * step
