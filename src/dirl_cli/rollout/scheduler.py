"""The scheduler of continuous batching: which request decodes in which slot, as numbers on the host.

A slot is a row of the KV cache and of `SequenceState`. Requests join and leave between blocks. All arrays are numpy on
the host, so that deciding what the next forward does never waits for the device.

Shapes: S slots, N blocks of B tokens in a forward, one a running slot.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dirl_cli.diffusion.sampling import request_key
from dirl_cli.errors import DirlError
from dirl_cli.rollout.forward import Forward, Integers
from dirl_cli.rollout.sampler import Hint, Watch
from dirl_cli.rollout.sequences import Unmasker
from dirl_cli.types import Decoding

SLOT, START, STEP, KEY = range(4)  # the rows of `Scheduler.blocks`


@dataclass(frozen=True)
class Request:
    """One completion to sample. prompt, sample: their indices. key: seed of its randomness (`request_key`)."""

    prompt: int
    sample: int
    prompt_ids: list[int]
    key: int
    hint: Hint = field(default_factory=dict)


def make_requests(
    prompts: Sequence[list[int]],
    n: int,
    decoding: Decoding,
    first: Sequence[int] | None,
    seeds: Sequence[int] | None,
    hints: Sequence[Sequence[Hint]] | None = None,
) -> list[Request]:
    """The requests of a call of `Sampler.stream`, one a completion, in order."""
    requests = []
    for i, prompt_ids in enumerate(prompts):
        seed = seeds[i] if seeds else decoding.seed
        first_sample = first[i] if first else 0
        for sample in range(first_sample, n):
            hint = hints[i][sample] if hints else {}
            requests.append(Request(i, sample, prompt_ids, request_key(seed, prompt_ids, sample), hint))
    return requests


def require_free_end(hint: Hint, longest: int, stop_token_ids: Sequence[int]) -> None:
    """Raises DirlError for a hint that leaves the sampler nothing to do, or that ends the answer itself.

    longest: tokens that the answer may have.
    """
    last = max(hint, default=-1)
    if last >= longest - 1:
        raise DirlError(f"a hint holds token {last + 1} of an answer of at most {longest}: leave the last one free")
    if not set(stop_token_ids).isdisjoint(hint.values()):
        raise DirlError("a hint holds a stop token, with which an answer ends: cut the hint before it")


@dataclass(frozen=True)
class Finished:
    """A request's completion, whole blocks.

    token_ids, reveal_step, logprobs: an entry a token. forwards: that it took. stopped: at a stop token.
    """

    request: Request
    token_ids: list[int]
    reveal_step: list[int]
    logprobs: list[float]
    forwards: int
    stopped: bool


class Scheduler:
    """Decodes at most `slots` requests at once on `forward`, each block by block in a slot of its own."""

    def __init__(self, forward: Forward, decoding: Decoding, slots: int) -> None:
        self.forward = forward
        self.decoding = decoding
        self.unmask = Unmasker(forward.lm, decoding, forward.decoder.head)
        self.block_size = forward.lm.block_size
        self.last_position = forward.lm.longest_prompt + 1
        self.stop_token_ids = np.array(decoding.stop_token_ids, np.int64)

        self.free = list(reversed(range(slots)))
        self.running: dict[int, Request] = {}  # by slot
        self.active = np.zeros(slots, bool)  # running and not in `waiting`
        self.waiting: dict[int, int] = {}  # slot to the slot in which its prompt is being computed
        self.prompt_in: dict[int, int] = {}  # slot to the prompt that it has cached, also after the answer ended

        self.blocks = np.zeros((4, slots), np.int64)  # the current block of each slot, as in `Forward.step`
        self.blocks[SLOT] = range(slots)
        self.cached = np.zeros(slots, np.int64)  # positions whose keys and values are final
        self.masked_count = np.zeros(slots, np.int64)  # masked tokens of the current block
        self.prompt_length = np.zeros(slots, np.int64)
        self.forwards = np.zeros(slots, np.int64)  # that the request has taken

    def add(self, request: Request) -> None:
        """Give a request a free slot. What its prompt has beyond whole blocks begins its first block."""
        length = len(request.prompt_ids)
        slot = self.free.pop()
        start = length // self.block_size * self.block_size
        self.forward.sequences.open(slot, request.prompt_ids, request.hint)
        self.running[slot] = request
        self.blocks[START:, slot] = start, 0, request.key
        self.masked_count[slot] = start + self.block_size - length
        self.prompt_length[slot] = length
        self.forwards[slot] = 0
        self._begin_block(slot)

        # A prompt is computed once: its other answers copy the keys and values, waiting for them if need be.
        holders = [holder for holder, prompt in self.prompt_in.items() if prompt == request.prompt]
        if not holders:
            self.prompt_in[slot] = request.prompt
            self.cached[slot] = 0
        elif self.cached[holders[0]] >= start:
            self._copy_prompt(slot, slot if slot in holders else holders[0])
        else:
            self.waiting[slot] = holders[0]
        self.active[slot] = slot not in self.waiting

    def step(self, watch: Watch | None = None) -> Iterator[Finished]:
        """Run one forward, which reveals some tokens of each active block; yields what thereby finishes."""
        slots = self.active.nonzero()[0]  # (N,)
        self.blocks[STEP, slots] += 1
        self.forwards[slots] += 1
        count = int(self.masked_count[slots].sum())

        # The forward caches all before the current block, whose own keys and values are final only when it is full.
        tokens = self.forward.step(self.blocks[:, slots], self.cached[slots], count, self.unmask)
        self.cached[slots] = self.blocks[START, slots]
        self.masked_count[slots] = (tokens < 0).sum(1)
        if watch:
            self._show(slots, watch)

        # This forward computed the prompts that these waited for.
        for slot, source in self.waiting.items():
            self._copy_prompt(slot, source)
            self.active[slot] = True
        self.waiting.clear()

        full = self.masked_count[slots] == 0
        if full.any():
            yield from self._end_blocks(slots[full], tokens[full])

    def _begin_block(self, slot: int) -> None:
        """Count what a hint holds of the slot's current block, and pass over blocks of which it holds every token.

        These take no forward of their own: they are cached with the next block.
        """
        hint = self.running[slot].hint
        if not hint:
            return
        first = -int(self.prompt_length[slot])  # index in the answer of position 0
        while True:
            start = first + int(self.blocks[START, slot])
            free = [i for i in range(max(start, 0), start + self.block_size) if i not in hint]
            self.masked_count[slot] = len(free)
            if free:
                return
            self.blocks[START, slot] += self.block_size

    def _copy_prompt(self, slot: int, source: int) -> None:
        """Let `slot` begin with the keys and values of the prompt's whole blocks in `source`, maybe itself."""
        length = int(self.prompt_length[slot]) // self.block_size * self.block_size
        if self.forward.lm.logit_shift:
            length -= self.block_size  # the last one is computed again: its end predicts the first token after it
        self.prompt_in[slot] = self.prompt_in[source]
        self.cached[slot] = max(length, 0)
        if slot != source:
            self.forward.cache.copy_prefix(source, slot, int(self.cached[slot]))

    def _end_blocks(self, slots: Integers, tokens: Integers) -> Iterator[Finished]:
        """Begin the next block of each of `slots`, whose blocks are full, or end there. tokens: (N, B)."""
        start = self.blocks[START, slots]
        end = start + self.block_size
        prompt_length = self.prompt_length[slots]

        # The first block may hold the end of the prompt, in which a stop token ends nothing.
        in_answer = start[:, None] + np.arange(self.block_size) >= prompt_length[:, None]
        is_stop = (tokens[:, :, None] == self.stop_token_ids).any(2)
        stopped = (is_stop & in_answer).any(1)
        is_over = stopped | (end >= self.last_position) | (end - prompt_length >= self.decoding.max_new_tokens)

        # Those that end are moved on too, so that START is where their answer ends.
        self.blocks[START, slots] = end
        self.blocks[STEP, slots] = 0
        self.masked_count[slots] = self.block_size
        for slot in slots[~is_over].tolist():
            self._begin_block(slot)
        self.active[slots[is_over]] = False
        for slot, by_stop_token in zip(slots[is_over].tolist(), stopped[is_over].tolist(), strict=True):
            answer = self.forward.sequences.slice(slot, int(self.prompt_length[slot]), int(self.blocks[START, slot]))
            self.free.append(slot)
            yield Finished(self.running.pop(slot), *answer, int(self.forwards[slot]), by_stop_token)

    def _show(self, slots: Integers, watch: Watch) -> None:
        for slot in slots.tolist():
            request = self.running[slot]
            end = int(self.blocks[START, slot]) + self.block_size
            tokens, _, _ = self.forward.sequences.slice(slot, len(request.prompt_ids), end)
            watch(request.prompt, request.sample, tokens)
