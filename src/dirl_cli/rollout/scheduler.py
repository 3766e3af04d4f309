"""Who decodes where: the slots of a running batch, as numbers on the host. Sequences join and leave between blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dirl_cli.models.kv_cache import KVCache
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.forward import Integers
from dirl_cli.rollout.reveal import Canvas, Revealer
from dirl_cli.rollout.sampler import Watch
from dirl_cli.types import Decoding

SLOT, START, STEP, KEY = range(4)


class Forwards(Protocol):
    """Some slots of a model, and forwards of them."""

    lm: DiffusionLM
    canvas: Canvas
    cache: KVCache

    def step(self, blocks: Integers, cached: Integers, count: int, reveal: Revealer) -> Integers:
        """Reveal some of N blocks; what their slots have not cached yet is computed on the way.

        blocks: (4, N): slot (ascending), first position, step from 1, the request's key. cached: (N,) positions whose
        keys and values are final, whole blocks. count: tokens still hidden in all blocks.
        Returns the tokens, -1 where still hidden: (N, B).
        """
        ...


@dataclass(frozen=True)
class Request:
    """An answer that is wanted."""

    prompt: int
    sample: int
    prompt_ids: list[int]
    key: int


@dataclass(frozen=True)
class Answer:
    """A finished one, its last block whole."""

    request: Request
    token_ids: list[int]
    reveal_step: list[int]
    logprobs: list[float]
    forwards: int
    stopped: bool


class Batch:
    """The requests that run, each in a slot of `forwards`, and how far they are."""

    def __init__(self, forwards: Forwards, decoding: Decoding, slots: int) -> None:
        self.forwards, self.decoding = forwards, decoding
        lm = forwards.lm
        self.reveal = Revealer(lm, decoding)
        self.block_size, self.last_position = lm.block_size, lm.longest_prompt + 1
        self.stops = np.array(decoding.stop_token_ids, np.int64)
        self.free = list(reversed(range(slots)))
        self.running: dict[int, Request] = {}
        self.active = np.zeros(slots, bool)  # those that run but for `waiting`
        self.waiting: dict[int, int] = {}  # slots to another slot, in which their prompt is being computed
        self.prompt_in: dict[int, int] = {}  # slots to the prompt that they hold in the cache, also after the answer
        self.blocks = np.zeros((4, slots), np.int64)  # see `Forwards.step`
        self.blocks[SLOT] = range(slots)
        self.cached, self.hidden, self.given, self.forwarded = np.zeros((4, slots), np.int64)

    def admit(self, request: Request) -> None:
        """Give a request a slot; the rest of its prompt that fills no block begins its first one."""
        slot, given = self.free.pop(), len(request.prompt_ids)
        start = given // self.block_size * self.block_size
        self.forwards.canvas.open(slot, request.prompt_ids)
        self.running[slot] = request
        self.blocks[START:, slot] = start, 0, request.key
        self.hidden[slot], self.given[slot], self.forwarded[slot] = start + self.block_size - given, given, 0
        holders = [other for other, prompt in self.prompt_in.items() if prompt == request.prompt]
        if not holders:
            self.prompt_in[slot], self.cached[slot] = request.prompt, 0
        elif self.cached[holders[0]] >= start:
            self._share(slot, slot if slot in holders else holders[0])
        else:
            self.waiting[slot] = holders[0]
        self.active[slot] = slot not in self.waiting

    def step(self, watch: Watch | None = None) -> Iterator[Answer]:
        """Reveal some of each block; yields the answers that thereby end."""
        slots = self.active.nonzero()[0]
        self.blocks[STEP, slots] += 1
        self.forwarded[slots] += 1
        count = int(self.hidden[slots].sum())
        shown = self.forwards.step(self.blocks[:, slots], self.cached[slots], count, self.reveal)
        self.cached[slots] = self.blocks[START, slots]
        self.hidden[slots] = (shown < 0).sum(1)
        if watch:
            self._show(slots, watch)
        for slot, source in self.waiting.items():
            self._share(slot, source)
            self.active[slot] = True
        self.waiting.clear()
        full = self.hidden[slots] == 0
        if full.any():
            yield from self._finish(slots[full], shown[full])

    def _share(self, slot: int, source: int) -> None:
        """Give `slot` the whole blocks of the prompt that `source` holds."""
        behind = self.block_size * self.forwards.lm.logit_shift  # the last block is computed again: its end predicts
        self.prompt_in[slot] = self.prompt_in[source]
        self.cached[slot] = max(self.blocks[START, slot] - behind, 0)
        if slot != source:
            self.forwards.cache.share(source, slot, int(self.cached[slot]))

    def _finish(self, slots: Integers, tokens: Integers) -> Iterator[Answer]:
        """Go on behind the full blocks of `slots`, or end there. tokens: (N, B)."""
        start, given = self.blocks[START, slots], self.given[slots]
        end = start + self.block_size
        in_answer = start[:, None] + np.arange(self.block_size) >= given[:, None]
        stopped = ((tokens[:, :, None] == self.stops).any(2) & in_answer).any(1)
        over = stopped | (end >= self.last_position) | (end - given >= self.decoding.max_new_tokens)
        self.blocks[START, slots], self.blocks[STEP, slots], self.hidden[slots] = end, 0, self.block_size
        self.active[slots[over]] = False
        for slot, is_stop in zip(slots[over].tolist(), stopped[over].tolist(), strict=True):
            answer = self.forwards.canvas.read(slot, int(self.given[slot]), int(self.blocks[START, slot]))
            self.free.append(slot)
            yield Answer(self.running.pop(slot), *answer, int(self.forwarded[slot]), is_stop)

    def _show(self, slots: Integers, watch: Watch) -> None:
        for slot in slots.tolist():
            request, end = self.running[slot], int(self.blocks[START, slot]) + self.block_size
            tokens, _, _ = self.forwards.canvas.read(slot, len(request.prompt_ids), end)
            watch(request.prompt, request.sample, tokens)
