"""The answers of a running batch on the device, and what one forward reveals of them."""

import torch
from torch import Tensor

from dirl_cli.diffusion.sampling import draw, uniform
from dirl_cli.diffusion.unmasking import BUILT_IN, State, find_strategy, quota, reveal, spread
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Decoding

HIDDEN, GIVEN = 0, -1  # in place of the step that revealed a token


class Canvas:
    """What is known of each slot, by position: (slots, length) each.

    tokens: the mask token where hidden. revealed_at: a step, from 1, HIDDEN or GIVEN.
    """

    def __init__(self, lm: DiffusionLM, slots: int, length: int) -> None:
        self.mask_token_id, self.length = lm.mask_token_id, length
        self.tokens = torch.full((slots, length), lm.mask_token_id, device=lm.device)
        self.revealed_at = torch.full((slots, length), GIVEN, device=lm.device)
        self.logprobs = torch.zeros(slots, length, device=lm.device)

    def open(self, slot: int, prompt_ids: list[int]) -> None:
        """Begin an answer: the prompt, and nothing after it."""
        self.tokens[slot, : len(prompt_ids)] = torch.tensor(prompt_ids, dtype=torch.long)
        self.tokens[slot, len(prompt_ids) :] = self.mask_token_id
        self.revealed_at[slot, : len(prompt_ids)] = GIVEN
        self.revealed_at[slot, len(prompt_ids) :] = HIDDEN

    def read(self, slot: int, begin: int, end: int) -> tuple[list[int], list[int], list[float]]:
        """Tokens, steps and log-probs of a stretch of an answer."""
        tokens, revealed_at, logprobs = (
            kept[slot, begin:end].tolist() for kept in (self.tokens, self.revealed_at, self.logprobs)
        )
        return tokens, revealed_at, logprobs


class Revealer:
    """Draws candidates for what is hidden of some blocks and writes those on a canvas that `decoding` chooses."""

    def __init__(self, lm: DiffusionLM, decoding: Decoding) -> None:
        self.head, self.decoding = lm.model.get_output_embeddings(), decoding
        self.strategy = find_strategy(decoding.strategy)
        self.is_built_in = decoding.strategy in BUILT_IN  # and so never waits for the device
        self.unsampled = torch.tensor(lm.unsampled_ids, device=lm.device)
        self.offsets = torch.arange(lm.block_size, device=lm.device)

    def __call__(self, canvas: Canvas, blocks: Tensor, hidden: Tensor, count: int) -> Tensor:
        """The blocks' tokens thereafter, -1 where still hidden: (N, B).

        blocks: (4, N), of each its slot, first position, step from 1 and request's key. hidden: (N * B, D).
        count: how many of their tokens are hidden, or more, which only costs time.
        """
        slot, start, step, key = blocks
        options = self.decoding
        position = start[:, None] + self.offsets
        places = slot[:, None] * canvas.length + position
        tokens, revealed_at = canvas.tokens.take(places), canvas.revealed_at.take(places)
        masked = revealed_at == HIDDEN
        where = masked.flatten().nonzero_static(size=count, fill_value=0)[:, 0]  # the device is not asked how many
        noise = uniform(key[:, None], position, step[:, None]).flatten()[where] if options.temperature else None
        drawn = draw(
            self.head(hidden[where]),
            noise,
            options.temperature,
            options.top_k,
            options.top_p,
            options.confidence,
            self.unsampled,
        )
        state = State(masked, drawn, quota(step, len(self.offsets), options.denoising_steps), options.threshold, start)
        chosen = reveal(self.strategy, state)
        tokens = torch.where(chosen, spread(drawn.tokens, masked), tokens)
        canvas.tokens.put_(places, tokens)
        canvas.revealed_at.put_(places, torch.where(chosen, step[:, None], revealed_at))
        logprobs = torch.where(chosen, spread(drawn.logprobs, masked), canvas.logprobs.take(places))
        canvas.logprobs.put_(places, logprobs)
        return torch.where(masked & ~chosen, -1, tokens)
