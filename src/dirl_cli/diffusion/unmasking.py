"""Decoding strategies: which candidates of a block are revealed.

A strategy maps a `State` to (N, B) bool. What it chooses is written into the running answers by the `Unmasker` of
rollout/sequences.py. Whatever it returns, the sampler reveals masked positions only and at
least one of them, the most confident, in every forward.

Shapes: N blocks of B tokens, M of them masked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import cast

import torch
from torch import Tensor

from dirl_cli.diffusion.sampling import Candidates
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.types import Decoding


@dataclass(frozen=True)
class State:
    """What a strategy decides on: N blocks that are being denoised.

    masked: (N, B) bool, still to be revealed. candidates: a token for each of the M masked positions, row by row.
    confidence, entropy, margin: (N, B), of the candidates, zero where revealed.
    quota: (N,) how many tokens this step owes so that the block is full after its last step.
    threshold: see `Decoding`; (N, B) where it depends on step or place. lowest_threshold: likewise.
    start: (N,) the position of each block's first token; every engine tells it.
    earlier: (N, B) the confidence with which earlier steps revealed each token, -1 where none did; None from LMDeploy.
    """

    masked: Tensor
    candidates: Candidates
    quota: Tensor
    threshold: float | Tensor
    start: Tensor | None = None
    lowest_threshold: float = 0.0
    earlier: Tensor | None = None

    @cached_property
    def confidence(self) -> Tensor:
        return spread(self.candidates.confidence, self.masked)

    @cached_property
    def entropy(self) -> Tensor:
        return spread(self.candidates.entropy, self.masked)

    @cached_property
    def margin(self) -> Tensor:
        return spread(self.candidates.margin, self.masked)


Strategy = Callable[[State], Tensor]


def sequential(state: State) -> Tensor:
    """The first `quota` masked positions from the left."""
    return state.masked & (state.masked.cumsum(-1) <= state.quota[:, None])


def low_confidence_static(state: State) -> Tensor:
    """The `quota` most confident positions."""
    return highest(state.confidence, state)


def low_confidence_dynamic(state: State) -> Tensor:
    """Every position above the threshold if those are at least `quota`, else the `quota` most confident."""
    return above_threshold(state.confidence, state)


def probability_margin(state: State) -> Tensor:
    """As the dynamic one, by how far the likeliest token is ahead of the next (Kim et al., arXiv 2502.06768).

    Dream's `topk_margin` is this with a threshold that nothing exceeds.
    """
    return above_threshold(state.margin, state)


def bounded_adaptive(state: State) -> Tensor:
    """Every position whose confidence reaches a threshold of the block's own, or else the most confident one.

    That is the mean confidence of what the block has revealed so far, before that its largest, between the two bounds:
    BACD of TDAR (github.com/LuLuLuyi/TDAR, its LMDeploy's `unmasking.py`).
    """
    earlier = cast(Tensor, state.earlier)  # engines.require_strategy sees to that
    surest = state.confidence.masked_fill(~state.masked, 0).amax(-1, keepdim=True)  # (N, 1)
    was_revealed = earlier >= 0
    count = was_revealed.sum(-1, keepdim=True)
    # In fp64, so that no order of the sum shows in the mean.
    total = earlier.double().masked_fill(~was_revealed, 0).sum(-1, keepdim=True)
    own = torch.where(count > 0, (total / count.clamp(min=1)).to(surest.dtype), surest)

    upper = cast(float, state.threshold)  # none but the dynamic one moves
    confident = state.masked & (state.confidence >= own.clamp(state.lowest_threshold, upper))
    most_confident = state.masked & (rank(state.confidence, state.masked) == 0)
    return torch.where(confident.any(-1, keepdim=True), confident, most_confident)


def entropy_bounded(state: State) -> Tensor:
    """In order of entropy, as many positions as keep the summed entropy within the bound (arXiv 2505.24857)."""
    # Entropies in order of rank, summed up, and back at their positions; the first is revealed whatever it is.
    rank_by_entropy = rank(-state.entropy, state.masked)
    in_order = state.entropy.masked_fill(~state.masked, 0).gather(-1, rank_by_entropy.argsort(-1))
    within_bound = (in_order.cumsum(-1) <= state.threshold).gather(-1, rank_by_entropy)
    return state.masked & (within_bound | (rank_by_entropy == 0))


def highest(score: Tensor, state: State) -> Tensor:
    """The `quota` masked positions of the highest score. score: (N, B)."""
    return state.masked & (rank(score, state.masked) < state.quota[:, None])


def above_threshold(score: Tensor, state: State) -> Tensor:
    """Every masked position above the threshold if those are at least `quota`, else the `quota` highest."""
    # Too few above the threshold would leave the block unfinished after its last step.
    above = state.masked & (score > state.threshold)
    enough = above.sum(-1, keepdim=True) >= state.quota[:, None]
    return torch.where(enough, above, highest(score, state))


def rank(score: Tensor, masked: Tensor) -> Tensor:
    """Each masked position's rank from 0 by descending score, the left one first on a tie. All (N, B)."""
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1)


def reveal(strategy: Strategy, state: State) -> Tensor:
    """What the strategy reveals, held to its contract: masked positions only, at least one in each block with any."""
    revealed = strategy(state) & state.masked
    if strategy in BUILT_IN.values():  # which keep it
        return revealed
    is_stuck = state.masked.any(-1) & ~revealed.any(-1)  # (N,)
    if is_stuck.is_cuda or is_stuck.any():  # to ask would be to wait for the GPU
        most_confident = state.masked & (rank(state.confidence, state.masked) == 0)
        revealed = torch.where(is_stuck[:, None], most_confident, revealed)
    return revealed


def spread(values: Tensor, masked: Tensor) -> Tensor:
    """`values` (M,) at the M masked positions, zero elsewhere: (N, B)."""
    return torch.zeros(masked.shape, dtype=values.dtype, device=values.device).masked_scatter(masked, values)


def quota(step: Tensor, block_size: int, steps: int | Tensor | None) -> Tensor:
    """Tokens owed at each `step` (N,), from 1, of `steps`: B // S, one more in the first B mod S, at least one.

    steps: of all, or of each (N,); None for as many as the block has tokens.
    """
    if steps is None:
        steps = block_size
    return (block_size // steps + (step <= block_size % steps).long()).clamp(min=1)


BUILT_IN: dict[str, Strategy] = {
    f.__name__: f
    for f in (
        sequential,
        low_confidence_static,
        low_confidence_dynamic,
        probability_margin,
        bounded_adaptive,
        entropy_bounded,
    )
}

FUSED = frozenset(  # have a branch in rollout/unmask_triton.py, which a new one need not
    (
        "sequential",
        "low_confidence_static",
        "low_confidence_dynamic",
        "probability_margin",
        "bounded_adaptive",
        "entropy_bounded",
    )
)
REMEMBERING = frozenset(("bounded_adaptive",))  # look at `State.earlier`
EXACT = frozenset(("sequential", "low_confidence_static"))  # reveal as many as they owe, whatever was drawn


def threshold_table(decoding: Decoding, block_size: int) -> Tensor:
    """The threshold at each denoising step of a block for each of its tokens: (S, B), fp32.

    Both changes are linear: threshold + by_step (s - 1) / (S - 1) + by_position i / (B - 1), s from 1, i from 0.
    """
    steps = decoding.denoising_steps or block_size
    step = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]  # of one step it is 0
    place = torch.linspace(0, 1, block_size, dtype=torch.float64)
    table = decoding.threshold + decoding.threshold_by_step * step + decoding.threshold_by_position * place
    return table.float()


def threshold_at(decoding: Decoding, table: Tensor, step: Tensor) -> float | Tensor:
    """The threshold of N blocks at their steps (N,), from 1: (N, B), or a number where it is one. table: (S, B)."""
    if not decoding.is_threshold_scheduled:
        return decoding.threshold
    return table[(step - 1).clamp(0, len(table) - 1)]  # of a block that only fills a graph it may be 0


def find_strategy(name: str) -> Strategy:
    """A built-in strategy by name, or any function by its import path."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise DirlError(f"no decoding strategy is called {name}: {did_you_mean(name, BUILT_IN)}")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DirlError(f"the decoding strategy {name} cannot be imported ({error}): check its path") from error
