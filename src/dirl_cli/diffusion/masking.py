"""Masking schedules: which answer tokens a fine-tuning step hides, and what each counts in the loss.

A schedule is called with `block`, the block number of each of the n answer tokens of one demonstration, and a
generator; it returns `masked` (V, n) bool and `weight` (V, n), one row per noised view. Where a rate p hides a
token, its weight is 1/p, so that each answer token counts once in expectation (SDAR, arXiv 2510.06303). What is hidden
and weighs 0 is context. Of sampled answers `TraceWindows` makes a schedule for each, by when its tokens were revealed.

Shapes: n answer tokens of a demonstration of L tokens, hidden in V views.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.layout import SHARED, Rows, Strip, lay_out, pack
from dirl_cli.diffusion.reveal_order import TraceWindows
from dirl_cli.ranges import Share

LOWEST_RATE = 1e-3  # keeps 1/p finite


class Masking(Protocol):
    """A masking schedule; see the head of this file for what goes in and comes out."""

    def __call__(self, block: Tensor, generator: Generator) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class PerBlock:
    """Each block has its own rate, uniform over (0, 1): the paper's objective."""

    def __call__(self, block: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return hide(rate(torch.rand(count(block), generator=generator))[index(block)], generator)


@dataclass(frozen=True)
class PerSample:
    """One rate for the whole answer, uniform over (0, 1), as in the published code."""

    def __call__(self, block: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return hide(rate(torch.rand(1, generator=generator)).expand(len(block)), generator)


@dataclass(frozen=True)
class Band:
    """Each block has its own rate, uniform between `low` and `high`."""

    low: Share
    high: Share

    def __call__(self, block: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        t = torch.rand(count(block), generator=generator)
        return hide((self.low + (self.high - self.low) * t)[index(block)], generator)


@dataclass(frozen=True)
class CosineRate:
    """Each block's rate is cos(πt/2), t uniform: heavily masked states are seen most (MaskGIT, arXiv 2202.04200)."""

    def __call__(self, block: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        t = torch.rand(count(block), generator=generator)
        return hide(rate(torch.cos(t * math.pi / 2))[index(block)], generator)


@dataclass(frozen=True)
class Stratified:
    """As per block, but an answer's rates are spread evenly over (0, 1), one in each n-th, in random order."""

    def __call__(self, block: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        n = count(block)
        t = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
        return hide(rate(t)[index(block)], generator)


@dataclass(frozen=True)
class Complementary:
    """As per block, in two views of which one hides what the other shows: every token is trained on every time."""

    def __call__(self, block: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        t = torch.rand(count(block), generator=generator)
        p = (LOWEST_RATE + (1 - 2 * LOWEST_RATE) * t)[index(block)]
        hidden = torch.rand(len(p), generator=generator) < p  # (n,)
        return torch.stack([hidden, ~hidden]), 0.5 / torch.stack([p, 1 - p])


@dataclass(frozen=True)
class CountPerBlock:
    """Each block hides k of its n answer tokens, k uniform over 1..n, each token of weight 1."""

    def __call__(self, block: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        sizes = torch.bincount(index(block))  # (blocks,)
        hidden_per_block = (torch.rand(len(sizes), generator=generator) * sizes).long() + 1

        # The fraction orders a block's tokens at random, the integer keeps the blocks in turn.
        fraction = torch.rand(len(block), generator=generator)
        rank = torch.argsort(torch.argsort(index(block) + fraction))  # (n,)
        rank_in_block = rank - (torch.cumsum(sizes, 0) - sizes)[index(block)]
        masked = rank_in_block < hidden_per_block[index(block)]
        return masked[None], torch.ones(1, len(block))


def index(block: Tensor) -> Tensor:
    """Block numbers counted from the first block that holds an answer token."""
    return block - block[0]


def count(block: Tensor) -> int:
    """The number of blocks that hold answer tokens."""
    return int(block[-1] - block[0]) + 1


def rate(t: Tensor) -> Tensor:
    """A masking rate from `LOWEST_RATE` to 1 for t in [0, 1]."""
    return (1 - LOWEST_RATE) * t + LOWEST_RATE


def hide(p: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Hide each token with its probability p, and one of them where that hides none. p: (n,).

    The weight is 1 over the probability of being hidden either way. For all but short answers that is 1/p; there
    the published code's 1/p would count a token up to 1.4 times.
    """
    masked = torch.rand(len(p), generator=generator) < p

    # Nothing hidden teaches nothing: then one token is, each equally likely.
    if not masked.any():
        masked[torch.randint(len(p), (1,), generator=generator)] = True

    none_hidden = (1 - p).prod()  # the probability of that
    return masked[None], (1 / (p + none_hidden / len(p)))[None]


@dataclass(frozen=True)
class Example:
    """A demonstration as whole blocks. token_ids: (L,) long; trained: (L,) bool, the answer and its padding.

    revealed_at: (L,) long, of a sampled answer the forward that revealed each token; None of any other.
    """

    token_ids: Tensor
    trained: Tensor
    revealed_at: Tensor | None = None


def example(
    token_ids: Sequence[int],
    trained: Sequence[bool],
    block_size: int,
    pad_id: int,
    revealed_at: Sequence[int] | None = None,
) -> Example:
    """Pad a demonstration to whole blocks; the padding is trained, since the sampler fills whole blocks too.

    It counts as revealed by the last forward, so that it makes no further state.
    """
    padding = -len(token_ids) % block_size
    ids = [*token_ids, *[pad_id] * padding]
    is_trained = [*trained, *[True] * padding]
    order = None
    if revealed_at is not None:
        order = torch.tensor([*revealed_at, *[max(revealed_at)] * padding])
    return Example(torch.tensor(ids), torch.tensor(is_trained, dtype=torch.bool), order)


def noised_strip(
    demonstration: Example, masking: Masking | TraceWindows, block_size: int, mask_id: int, generator: Generator
) -> Strip:
    """A demonstration with freshly hidden answer tokens."""
    answer = demonstration.trained.nonzero().squeeze(1)  # (n,) positions
    if isinstance(masking, TraceWindows):
        order = demonstration.revealed_at
        masking = masking.along(None if order is None else order[answer])
    answer_masked, answer_weight = masking(answer // block_size, generator)  # (V, n)
    masked = torch.zeros(len(answer_masked), len(demonstration.token_ids), dtype=torch.bool)  # (V, L)
    masked[:, answer] = answer_masked
    weight = torch.zeros(masked.shape)
    weight[:, answer] = answer_weight
    scored = masked & (weight != 0)  # so that a weight that is no number is seen
    return lay_out(demonstration.token_ids, masked, scored, weight, block_size, mask_id)


def causal_strip(demonstration: Example, weight: float) -> Strip:
    """A demonstration as a causal model learns it, in rows whose blocks are single tokens: each predicts the next."""
    # One view and blocks of one token: the attention rule is then the causal mask.
    answer = demonstration.trained.nonzero().squeeze(1)
    answer = answer[answer > 0]  # nothing predicts the very first token
    position = torch.arange(len(demonstration.token_ids))
    return Strip(
        token_ids=demonstration.token_ids,
        sequence=torch.full_like(position, SHARED),
        position=position,
        view=torch.zeros_like(position),
        target_index=answer - 1,  # the token before it predicts it, whatever kind of model
        shifted_index=answer - 1,
        targets=demonstration.token_ids[answer],
        weight=torch.full(answer.shape, weight),
    )


def noised_rows(
    demonstrations: Sequence[Example],
    masking: Masking | TraceWindows,
    block_size: int,
    mask_id: int,
    pad_id: int,
    row_tokens: int,
    generator: Generator,
) -> tuple[Rows, int]:
    """Packed rows of freshly masked demonstrations, and how many answer tokens these have (the loss's normaliser)."""
    strips = [noised_strip(example, masking, block_size, mask_id, generator) for example in demonstrations]
    answer_tokens = sum(int(example.trained.sum()) for example in demonstrations)
    return pack(strips, row_tokens, block_size, pad_id), answer_tokens
