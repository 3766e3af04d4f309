"""The scheduler of continuous batching: which request decodes in which slot, as numbers on the host.

A slot is a row of `SequenceState` and of the table of pages. Requests join and leave between blocks. All arrays are
numpy on the host, so that deciding what the next forward does never waits for the device.

Where pages run short, an answer that has none waits in its slot, where its tokens are: one that has not begun yet, or
the youngest, whose pages the older ones were given. It goes on when there are enough again, and the keys and values of
what it has are computed anew. What it draws is the same but for rounding, since that depends on its request, position
and step alone. The oldest always goes on, because any answer fits alone.

Shapes: S slots, N blocks of B tokens in a forward, one a running slot.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dirl_cli.diffusion.unmasking import EXACT, quota
from dirl_cli.rollout.forward import Forward
from dirl_cli.rollout.pages import Integers
from dirl_cli.rollout.requests import Request, rule_of
from dirl_cli.rollout.sampler import Watch
from dirl_cli.rollout.sequences import MixedUnmasker, SequencePart, Unmasker, UnmaskerPart
from dirl_cli.types import Decoding, StopReason

SLOT, START, STEP, KEY = range(4)  # the rows of `Scheduler.blocks`


@dataclass(frozen=True)
class Finished:
    """A request's completion, or what there is of it: whole blocks, after those that it began with.

    part: its tokens. forwards: that it took. stopped: at a stop token.
    """

    request: Request
    part: SequencePart
    forwards: int
    stopped: bool


@dataclass(frozen=True)
class FullBlock:
    """The part of a running completion that one block is. forwards: up to its end. stop_reason: of the last one."""

    request: Request
    part: SequencePart
    forwards: int
    stop_reason: StopReason | None


class Scheduler:
    """Decodes at most `slots` requests at once on `forward`, each block by block in a slot of its own.

    show_block: called with each block that is full, in place of what `step` yields of whole answers.
    """

    def __init__(self, forward: Forward, slots: int, show_block: Callable[[FullBlock], None] | None = None) -> None:
        self.forward = forward
        self.show_block = show_block
        self.block_size = forward.lm.block_size
        self.last_position = forward.lm.longest_prompt + 1
        self.unmaskers: dict[int, Unmasker] = {}  # of the rules of running requests, by a number

        self.pages = forward.pages
        self.pages.clear()  # of what an earlier scheduler left
        self.free = list(reversed(range(slots)))
        self.running: dict[int, Request] = {}  # by slot, the oldest first
        self.active = np.zeros(slots, bool)  # running, and has its pages
        self.prompt_in: dict[int, tuple[int, int]] = {}  # slot to the prefix in its pages, also after the answer ended

        self.blocks = np.zeros((4, slots), np.int64)  # the current block of each slot, as in `Forward.step`
        self.blocks[SLOT] = range(slots)
        self.cached = np.zeros(slots, np.int64)  # positions whose keys and values are final
        self.masked_count = np.zeros(slots, np.int64)  # masked tokens of the current block
        self.prompt_length = np.zeros(slots, np.int64)
        self.forwards = np.zeros(slots, np.int64)  # that the request has taken
        self.max_new_tokens = np.zeros(slots, np.int64)
        self.stop_token_ids = np.full((slots, 1), -1)  # -1 where a request has fewer than another had
        self.denoising_steps = np.zeros(slots, np.int64)
        self.is_exact = np.zeros(slots, bool)  # reveals as many tokens as it owes, whatever is drawn
        self.rule = np.full(slots, -1)  # the number of its unmasker, also after the answer ended

    def add(self, request: Request) -> None:
        """Give a request a free slot. What its prompt has beyond whole blocks begins its first block."""
        given_ids = [*request.prompt_ids, *request.answer_ids]
        length = len(given_ids)
        has_prompt = [slot for slot in self.free if self.prompt_in.get(slot) == request.prefix]
        slot = has_prompt[-1] if has_prompt else self.free[-1]
        self.free.remove(slot)
        self.forward.sequences.open(slot, given_ids, request.hint)
        self.running[slot] = request
        start = length // self.block_size * self.block_size
        self.blocks[START:, slot] = start, 0, request.key
        self.masked_count[slot] = start + self.block_size - length
        self.prompt_length[slot] = length
        self.forwards[slot] = 0
        self._note_decoding(slot, request.decoding)
        self.max_new_tokens[slot] -= len(request.answer_ids)
        self._begin_block(slot)

    def _note_decoding(self, slot: int, decoding: Decoding) -> None:
        """Write down for a slot how its request is decoded."""
        self.max_new_tokens[slot] = decoding.max_new_tokens
        self.denoising_steps[slot] = decoding.denoising_steps or self.block_size
        self.is_exact[slot] = decoding.strategy in EXACT

        ids = decoding.stop_token_ids
        missing = len(ids) - self.stop_token_ids.shape[1]
        if missing > 0:
            self.stop_token_ids = np.pad(self.stop_token_ids, ((0, 0), (0, missing)), constant_values=-1)
        self.stop_token_ids[slot] = -1
        self.stop_token_ids[slot, : len(ids)] = ids
        self.rule[slot] = self._rule_number(rule_of(decoding))

    def _rule_number(self, rule: Decoding) -> int:
        """The number under which the unmasker of a rule is kept. Those that no request needs any more are forgotten."""
        for number, unmask in self.unmaskers.items():
            if unmask.decoding == rule:
                return number
        needed = set(self.rule[list(self.running)].tolist())
        self.unmaskers = {number: unmask for number, unmask in self.unmaskers.items() if number in needed}
        number = max(self.unmaskers, default=-1) + 1
        self.unmaskers[number] = Unmasker(self.forward.lm, rule, self.forward.decoder.head)
        return number

    def remove(self, slot: int) -> None:
        """Let a request leave its slot before it has ended."""
        if self.active[slot]:
            self._leave(slot)
        elif slot in self.prompt_in:
            self._release(slot)  # what an earlier answer left there, of a prompt whose length is forgotten
        del self.running[slot]
        self.free.append(slot)

    def under_way(self) -> list[Finished]:
        """What running requests have by now, those that have a full block; forwards: up to its end."""
        starts = self.blocks[START]
        slots = np.array([slot for slot in self.running if starts[slot] > self.prompt_length[slot]], np.int64)
        if not len(slots):
            return []
        forwards = self.forwards[slots] - self.blocks[STEP, slots]
        answers = self.forward.sequences.fetch(slots, self.prompt_length[slots], starts[slots])
        parts = []
        for slot, answer, count in zip(slots.tolist(), answers, forwards.tolist(), strict=True):
            parts.append(Finished(self.running[slot], answer, count, stopped=False))
        return parts

    def step(self, watch: Watch | None = None) -> Iterator[Finished]:
        """Run one forward, which reveals some tokens of each active block; yields what thereby finishes."""
        self._extend_active()
        self._start_stalled()
        slots = self.active.nonzero()[0]  # (N,)
        self.blocks[STEP, slots] += 1
        self.forwards[slots] += 1
        count = int(self.masked_count[slots].sum())

        # The forward caches all before the current block, whose own keys and values are final only when it is full.
        left = None if watch else self._left_masked(slots)
        reads = left is None or not left.all()
        tokens = self.forward.step(self.blocks[:, slots], self.cached[slots], count, self._unmasker(slots), reads)
        self.cached[slots] = self.blocks[START, slots]
        if tokens is not None:
            self.masked_count[slots] = (tokens < 0).sum(1)
        elif left is not None:
            self.masked_count[slots] = left
        if watch:
            self._show(slots, watch)

        full = self.masked_count[slots] == 0
        if tokens is not None and full.any():
            yield from self._end_blocks(slots[full], tokens[full])

    def _left_masked(self, slots: Integers) -> Integers | None:
        """How many tokens of each block the next forward will leave masked; None where that depends on what it draws.

        Where it leaves some of each, the host needs no tokens and sends the next step while the device is at this one.
        """
        if not self.is_exact[slots].all():
            return None
        step = torch.from_numpy(self.blocks[STEP, slots])
        owed = quota(step, self.block_size, torch.from_numpy(self.denoising_steps[slots])).numpy()
        return np.maximum(self.masked_count[slots] - owed, 0)

    def _unmasker(self, slots: Integers) -> Unmasker | MixedUnmasker:
        """What reveals tokens of these slots: the unmasker of their one rule, or several side by side."""
        numbers = self.rule[slots]  # (N,)
        if (numbers == numbers[0]).all():
            return self.unmaskers[int(numbers[0])]
        parts = []
        for number in np.unique(numbers).tolist():
            members = slots[numbers == number]
            parts.append(UnmaskerPart(self.unmaskers[number], members, int(self.masked_count[members].sum())))
        return MixedUnmasker(parts)

    def _extend_active(self) -> None:
        """Let active answers have pages for their current blocks, the oldest first, if need be the youngest's."""
        room = self.pages.held[: len(self.active)] * self.pages.size
        lacking = self.active & (self.blocks[START] + self.block_size > room)
        if not lacking.any():
            return
        for slot in [slot for slot in self.running if lacking[slot]]:
            while self.active[slot] and not self.pages.extend(slot, self._block_end(slot)):
                if not self._reclaim(slot):
                    self._stall(next(youngest for youngest in reversed(self.running) if self.active[youngest]))

    def _stall(self, slot: int) -> None:
        """Let an active answer wait, its pages free."""
        self.active[slot] = False
        self._release(slot)

    def _start_stalled(self) -> None:
        """Let answers without pages begin or go on, the oldest first, as far as the free pages suffice."""
        if len(self.running) == self.active.sum():
            return
        for slot in [slot for slot in self.running if not self.active[slot]]:
            if not self._start(slot):
                return

    def _start(self, slot: int) -> bool:
        """Give a slot the pages up to its current block; False where too few are free.

        A prompt is computed once: its other answers wait for that, share the pages that it fills, and copy what it has
        of the next one.
        """
        prompt = self.running[slot].prefix
        if self.prompt_in.get(slot, prompt) != prompt:
            self._release(slot)

        end = self._block_end(slot)
        prefix = self._prefix(slot)
        while True:
            holder = self._prompt_holder(slot)
            if holder is not None and self.cached[holder] < self._prompt_end(slot):
                return True  # the next forward computes it
            ready = int(self.pages.held[slot])
            if holder is not None and holder != slot:
                ready = prefix // self.pages.size

            # Each active answer can go on to a page more, so that this one is not stalled again at once.
            growing = self.pages.held[self.active.nonzero()[0]] < self.pages.longest
            if self.pages.pages_of(end) - ready + growing.sum() <= len(self.pages.free):
                break
            if not self._reclaim(slot):
                return False

        if holder is not None and holder != slot:
            self._share_prompt(holder, slot, prefix)
        self.pages.extend(slot, end)
        self.cached[slot] = 0 if holder is None else prefix
        self.prompt_in[slot] = prompt
        self.active[slot] = True
        return True

    def _share_prompt(self, holder: int, slot: int, prefix: int) -> None:
        """Let a slot begin with the pages that the first `prefix` positions of another fill, and a copy of the rest."""
        self.pages.share(holder, slot, prefix)
        self.pages.extend(slot, prefix)
        whole, rest = divmod(prefix, self.pages.size)
        if rest:
            source, target = int(self.pages.rows[holder, whole]), int(self.pages.rows[slot, whole])
            self.forward.cache.copy_page(source, target, rest)

    def _prompt_holder(self, slot: int) -> int | None:
        """The slot that has this one's prompt in its pages, or will after the next forward: this one, or another."""
        prompt = self.running[slot].prefix
        holders = [holder for holder, held in self.prompt_in.items() if held == prompt]
        if slot in holders:
            return slot
        return max(holders, key=lambda holder: self.cached[holder], default=None)

    def _prompt_end(self, slot: int) -> int:
        """The positions that whole blocks of a slot's prompt take."""
        return int(self.prompt_length[slot]) // self.block_size * self.block_size

    def _prefix(self, slot: int) -> int:
        """The positions whose keys and values answers to a slot's prompt have in common."""
        end = self._prompt_end(slot)
        if self.forward.lm.logit_shift:
            end -= self.block_size  # the last one is computed again: its end predicts the first token after it
        return max(end, 0)

    def _block_end(self, slot: int) -> int:
        return int(self.blocks[START, slot]) + self.block_size

    def _reclaim(self, slot: int) -> bool:
        """Take back the pages of a prompt that no active slot has, other than this one; False if there are none."""
        for holder in self.prompt_in:
            if holder != slot and not self.active[holder]:
                self._release(holder)
                return True
        return False

    def _release(self, slot: int) -> None:
        """Take back all pages of a slot."""
        self.pages.trim(slot, 0)
        self.cached[slot] = 0
        del self.prompt_in[slot]

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

    def _end_blocks(self, slots: Integers, tokens: Integers) -> Iterator[Finished]:
        """Begin the next block of each of `slots`, whose blocks are full, or end there. tokens: (N, B)."""
        start = self.blocks[START, slots]
        end = start + self.block_size
        prompt_length = self.prompt_length[slots]

        # The first block may hold the end of the prompt, in which a stop token ends nothing.
        in_answer = start[:, None] + np.arange(self.block_size) >= prompt_length[:, None]
        is_stop = (tokens[:, :, None] == self.stop_token_ids[slots][:, None]).any(2)
        stopped = (is_stop & in_answer).any(1)
        is_over = stopped | (end >= self.last_position) | (end - prompt_length >= self.max_new_tokens[slots])
        if self.show_block:
            parts = self.forward.sequences.fetch(slots, np.maximum(start, prompt_length), end)
            for i, (slot, part) in enumerate(zip(slots.tolist(), parts, strict=True)):
                stop_reason: StopReason | None = None
                if is_over[i]:
                    stop_reason = "stop" if stopped[i] else "length"
                self.show_block(FullBlock(self.running[slot], part, int(self.forwards[slot]), stop_reason))

        # Those that end are moved on too, so that START is where their answer ends.
        self.blocks[START, slots] = end
        self.blocks[STEP, slots] = 0
        self.masked_count[slots] = self.block_size
        for slot in slots[~is_over].tolist():
            self._begin_block(slot)
        over = slots[is_over]
        if self.show_block:
            for slot in over.tolist():
                self._end(slot)
            return
        if not len(over):
            return
        answers = self.forward.sequences.fetch(over, self.prompt_length[over], self.blocks[START, over])
        for slot, answer, by_stop_token in zip(over.tolist(), answers, stopped[is_over].tolist(), strict=True):
            yield Finished(self._end(slot), answer, int(self.forwards[slot]), by_stop_token)

    def _end(self, slot: int) -> Request:
        """Free a slot, whose request has ended; returns that."""
        self.free.append(slot)
        self._leave(slot)
        return self.running.pop(slot)

    def _leave(self, slot: int) -> None:
        """Take an answer's pages back, but for those that the next answer to its prompt may begin with."""
        self.active[slot] = False
        self.pages.trim(slot, self._prefix(slot))

    def _show(self, slots: Integers, watch: Watch) -> None:
        ends = self.blocks[START, slots] + self.block_size
        answers = self.forward.sequences.fetch(slots, self.prompt_length[slots], ends)
        for slot, answer in zip(slots.tolist(), answers, strict=True):
            request = self.running[slot]
            watch(request.prompt, request.sample, answer.token_ids)
