"""The sequences of a running batch on the device, and the unmasker that reveals tokens of them after a forward.

Which tokens that are is decided by the strategies of diffusion/unmasking.py.

Shapes: S slots, N blocks of B tokens in a forward, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dirl_cli.diffusion.sampling import Candidates, draw_candidates, draw_seed
from dirl_cli.diffusion.unmasking import (
    BUILT_IN,
    FUSED,
    State,
    find_strategy,
    quota,
    reveal,
    spread,
    threshold_at,
    threshold_table,
)
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.pages import Integers
from dirl_cli.rollout.sampler import Hint
from dirl_cli.types import HELD, Decoding

MASKED, GIVEN = 0, -1  # in `revealed_at`, where no step has revealed the token; GIVEN of prompts and hints


@dataclass(frozen=True)
class SequencePart:
    """Tokens of a sequence and how each came about; entropies: empty where they are not recorded."""

    token_ids: list[int]
    reveal_step: list[int]
    logprobs: list[float]
    entropies: list[float] = field(default_factory=list)


class SequenceState:
    """The tokens of each slot's sequence and when they were revealed, by position: (S, length) each.

    tokens: the mask token where masked. revealed_at: the denoising step, from 1, or MASKED or GIVEN.
    logprobs, confidences: of revealed tokens, when they were revealed. entropies: likewise, None where nobody asked.
    """

    def __init__(self, lm: DiffusionLM, slots: int, length: int, record_entropy: bool = False) -> None:
        self.mask_token_id = lm.mask_token_id
        self.length = length
        self.opened: dict[int, Integers] = {}  # by slot, what is not on the device yet, -1 where masked
        self.tokens = torch.full((slots, length), lm.mask_token_id, device=lm.device)
        self.revealed_at = torch.full((slots, length), GIVEN, device=lm.device)
        self.logprobs = torch.zeros(slots, length, device=lm.device)
        self.confidences = torch.zeros(slots, length, device=lm.device)  # read where the token was revealed only
        self.entropies = torch.zeros(slots, length, device=lm.device) if record_entropy else None

    def open(self, slot: int, prompt_ids: list[int], hint: Hint) -> None:
        """Begin a sequence in `slot`: the prompt, and masked tokens after it but for those that the hint holds.

        It is on the device after the next `send_opened`.
        """
        row = np.full(self.length, -1)
        row[: len(prompt_ids)] = prompt_ids
        for index, token in hint.items():
            row[len(prompt_ids) + index] = token
        self.opened[slot] = row

    def send_opened(self) -> None:
        """Bring the sequences that were opened since the last time to the device, all of them in one copy."""
        if not self.opened:
            return
        rows = np.column_stack([list(self.opened), np.stack(list(self.opened.values()))])
        self.opened.clear()
        slots, tokens = upload(rows, self.tokens.device).split([1, self.length], 1)
        slots = slots[:, 0]
        is_masked = tokens < 0
        self.tokens[slots] = torch.where(is_masked, self.mask_token_id, tokens)
        self.revealed_at[slots] = torch.where(is_masked, MASKED, GIVEN)
        self.logprobs.index_fill_(0, slots, 0)
        if self.entropies is not None:
            self.entropies.index_fill_(0, slots, 0)

    def fetch(self, slots: Integers, begin: Integers, end: Integers) -> list[SequencePart]:
        """What some slots hold, each from its own position `begin` to `end`; all (n,)."""
        length = end - begin
        position = begin[:, None] + np.arange(length.max())  # (n, the longest), of which the shorter ones need less
        index = upload(slots[:, None] * self.length + np.minimum(position, self.length - 1), self.tokens.device)
        recorded = [self.tokens, self.revealed_at, self.logprobs]
        if self.entropies is not None:
            recorded.append(self.entropies)
        tokens, revealed_at, *numbers = (each.take(index).cpu().numpy() for each in recorded)
        revealed_at[revealed_at == GIVEN] = HELD
        return [
            SequencePart(*(each[i, :last].tolist() for each in (tokens, revealed_at, *numbers)))
            for i, last in enumerate(length)
        ]


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device; to a GPU it is copied without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Unmasker:
    """Draws a candidate for every masked token of some blocks and reveals those that `decoding` chooses.

    head: final hidden states (N, D) to logits (N, V). is_fused: a kernel each before and after drawing, as on a GPU,
    for the strategies that have a branch there.
    """

    def __init__(
        self, lm: DiffusionLM, decoding: Decoding, head: Callable[[Tensor], Tensor], is_fused: bool | None = None
    ) -> None:
        self.head = head
        self.decoding = decoding
        self.strategy = find_strategy(decoding.strategy)
        self.is_built_in = decoding.strategy in BUILT_IN  # and so never waits for the device
        self.is_fused = decoding.strategy in FUSED and (lm.device.type == "cuda" if is_fused is None else is_fused)
        self.unsampled = torch.tensor(lm.unsampled_ids, device=lm.device)
        self.offsets = torch.arange(lm.block_size, device=lm.device)
        self.thresholds = threshold_table(decoding, lm.block_size).to(lm.device)

    def __call__(self, sequences: SequenceState, blocks: Tensor, hidden: Tensor, count: int) -> Tensor:
        """Reveal some tokens of N blocks in `sequences`; returns the blocks, -1 where still masked: (N, B).

        blocks: (4, N), of each its slot, first position, step from 1 and request's key.
        hidden: (N * B, D), the final hidden states that predict the blocks' tokens.
        count: how many of their tokens are masked, or more, which only costs time.
        """
        if self.is_fused:
            return self._unmask_fused(sequences, blocks, hidden, count)
        slot, start, step, key = blocks
        options = self.decoding
        position = start[:, None] + self.offsets  # (N, B)
        index = slot[:, None] * sequences.length + position  # (N, B), into the flattened (S, length)
        tokens = sequences.tokens.take(index)
        revealed_at = sequences.revealed_at.take(index)
        masked = revealed_at == MASKED

        # `count` comes from the host: asking the device how many are masked would wait for it.
        masked_index = masked.flatten().nonzero_static(size=count, fill_value=0)[:, 0]  # (count,)
        seeds = None
        if options.temperature:
            seeds = draw_seed(key[:, None], position, step[:, None]).flatten()[masked_index]
        drawn = self._draw(hidden[masked_index], seeds)
        confidences = sequences.confidences.take(index)
        state = State(
            masked,
            drawn,
            quota(step, len(self.offsets), options.denoising_steps),
            threshold_at(options, self.thresholds, step),
            start,
            options.lowest_threshold,
            earlier=torch.where(revealed_at > 0, confidences, -1.0),
        )
        revealed = reveal(self.strategy, state)  # (N, B) bool

        # In place, since a CUDA graph that replays this has to find the same tensors.
        tokens = torch.where(revealed, spread(drawn.tokens, masked), tokens)
        sequences.tokens.put_(index, tokens)
        sequences.revealed_at.put_(index, torch.where(revealed, step[:, None], revealed_at))
        logprobs = torch.where(revealed, spread(drawn.logprobs, masked), sequences.logprobs.take(index))
        sequences.logprobs.put_(index, logprobs)
        sequences.confidences.put_(index, torch.where(revealed, state.confidence, confidences))
        if sequences.entropies is not None:
            entropies = torch.where(revealed, spread(drawn.entropy, masked), sequences.entropies.take(index))
            sequences.entropies.put_(index, entropies)
        return torch.where(masked & ~revealed, -1, tokens)

    def _unmask_fused(self, sequences: SequenceState, blocks: Tensor, hidden: Tensor, count: int) -> Tensor:
        from dirl_cli.rollout.unmask_triton import reveal_drawn, select_masked  # which only a GPU has the package for

        size = len(self.offsets)
        rows, seeds, first = select_masked(sequences, blocks, size, count)
        drawn = self._draw(hidden[rows], seeds if self.decoding.temperature else None)
        return reveal_drawn(sequences, blocks, size, first, drawn, self.decoding, self.thresholds)

    def _draw(self, hidden: Tensor, seeds: Tensor | None) -> Candidates:
        """A candidate for each of the masked tokens that these hidden states predict."""
        options = self.decoding
        return draw_candidates(
            self.head(hidden),
            seeds,
            options.temperature,
            options.top_k,
            options.top_p,
            options.confidence,
            self.unsampled,
        )


@dataclass(frozen=True)
class UnmaskerPart:
    """The slots whose blocks an unmasker is for, n of them. masked: how many of their tokens are, or more."""

    unmask: Unmasker
    slots: Integers
    masked: int


class MixedUnmasker:
    """Several unmaskers side by side, each for the blocks of slots of its own, in one forward."""

    is_built_in = False  # it is made for one forward, and so nothing that a CUDA graph could replay

    def __init__(self, parts: Sequence[UnmaskerPart]) -> None:
        self.parts = parts

    def __call__(self, sequences: SequenceState, blocks: Tensor, hidden: Tensor, count: int) -> Tensor:
        """See `Unmasker.__call__`."""
        states = hidden.unflatten(0, (blocks.shape[1], -1))  # (N, B, D)
        tokens = torch.full(states.shape[:2], -1, device=blocks.device)
        for part in self.parts:
            slots = upload(part.slots, blocks.device)
            is_part = (blocks[0, :, None] == slots).any(1)  # (N,)
            index = is_part.nonzero_static(size=len(part.slots))[:, 0]  # without asking the device for their number
            own = part.unmask(sequences, blocks[:, index], states[index].flatten(0, 1), part.masked)
            tokens[index] = own
        return tokens
