"""In which states the tokens of a trajectory are scored: what an RL objective takes for their probability.

Views map a trajectory to a strip whose scored tokens are answer tokens (see diffusion/layout.py). Only `Trace`
scores each token in the state that the sampler was in; the others trade exactness for forwards, or follow a paper
written for models without a trace.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.layout import SHARED, Strip, lay_out
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Count, InnerShare, Share
from dirl_cli.types import Trajectory


@dataclass(frozen=True)
class BlockSpec:
    """What views need to know of the model."""

    block_size: int
    mask_id: int


class Views(Protocol):
    """From a trajectory to the states that score it. What is random in them comes from the generator."""

    def __call__(self, trajectory: Trajectory, tokens: BlockSpec, generator: Generator) -> Strip: ...


@dataclass(frozen=True)
class Trace:
    """Each token in the very state that revealed it: one view per denoising step of each block (DiRL, eq. 6–8)."""

    def __call__(self, trajectory: Trajectory, tokens: BlockSpec, generator: Generator) -> Strip:
        return trajectory_strip(trajectory, tokens.block_size, tokens.mask_id)


@dataclass(frozen=True)
class MergedTrace:
    """The trace with every `steps` successive steps of a block taken for one (TraceRL, arXiv 2509.06949)."""

    steps: Count

    def __call__(self, trajectory: Trajectory, tokens: BlockSpec, generator: Generator) -> Strip:
        merged = [(step + self.steps - 1) // self.steps for step in trajectory.reveal_step]
        return Trace()(replace(trajectory, reveal_step=merged), tokens, generator)


@dataclass(frozen=True)
class LeftToRight:
    """Each token given all before it, the rest of its block masked, however it was sampled (arXiv 2601.15165)."""

    def __call__(self, trajectory: Trajectory, tokens: BlockSpec, generator: Generator) -> Strip:
        start = len(trajectory.prompt_ids)
        places = range(start, start + len(trajectory.token_ids))
        first = [max(place // tokens.block_size * tokens.block_size, start) for place in places]
        one_by_one = [place - begin + 1 for place, begin in zip(places, first, strict=True)]
        return Trace()(replace(trajectory, reveal_step=one_by_one), tokens, generator)


@dataclass(frozen=True)
class AnswerMasked:
    """All answer tokens at once, the whole answer masked, each prompt token with `prompt_rate` (d1, arXiv 2504.12216).

    One copy of the sequence, in which a block sees the masks of the blocks before it.
    """

    prompt_rate: Share

    def __call__(self, trajectory: Trajectory, tokens: BlockSpec, generator: Generator) -> Strip:
        start = len(trajectory.prompt_ids)
        token_ids = torch.tensor([*trajectory.prompt_ids, *trajectory.token_ids])
        place = torch.arange(len(token_ids))
        masked = (torch.rand(len(token_ids), generator=generator) < self.prompt_rate) | (place >= start)
        return Strip(
            token_ids=torch.where(masked, tokens.mask_id, token_ids),
            sequence=torch.full_like(place, SHARED),
            position=place,
            view=torch.zeros_like(place),
            target_index=place[start:],
            shifted_index=place[start:] - 1,
            targets=token_ids[start:],
            weight=torch.ones(len(token_ids) - start),
        )


@dataclass(frozen=True)
class RandomMasks:
    """Answer tokens masked at random on the clean prefix, at one rate in [low, high] a draw (MMaDA, arXiv 2505.15809).

    Several draws are averaged.
    """

    low: Share
    high: Share
    draws: Count

    def __call__(self, trajectory: Trajectory, tokens: BlockSpec, generator: Generator) -> Strip:
        rates = self.low + (self.high - self.low) * torch.rand(self.draws, 1, generator=generator)
        masked = torch.rand(self.draws, len(trajectory.token_ids), generator=generator) < rates
        masked[0] |= ~masked.any()  # an answer without a scored token would not be trained at all
        return masked_strip(trajectory, tokens, masked, torch.full(masked.shape, 1 / self.draws))


@dataclass(frozen=True)
class ComplementaryMasks:
    """A random mask of rate ρ in [low, high] and its complement, weighted 1/2ρ and 1/2(1-ρ) (arXiv 2506.20639)."""

    low: InnerShare
    high: InnerShare

    def __call__(self, trajectory: Trajectory, tokens: BlockSpec, generator: Generator) -> Strip:
        rate = self.low + (self.high - self.low) * torch.rand(1, generator=generator)
        masked = torch.rand(len(trajectory.token_ids), generator=generator) < rate
        weight = 0.5 / torch.stack([rate, 1 - rate]).expand(2, len(masked))
        return masked_strip(trajectory, tokens, torch.stack([masked, ~masked]), weight)


def masked_strip(trajectory: Trajectory, tokens: BlockSpec, masked: Tensor, weight: Tensor) -> Strip:
    """The trajectory with these answer tokens masked and scored. masked, weight: (V, answer)."""
    prompt = torch.zeros(len(masked), len(trajectory.prompt_ids))
    everywhere = torch.cat([prompt.bool(), masked], 1)
    token_ids = torch.tensor([*trajectory.prompt_ids, *trajectory.token_ids])
    weights = torch.cat([prompt, weight], 1)
    return lay_out(token_ids, everywhere, everywhere, weights, tokens.block_size, tokens.mask_id)


def trajectory_strip(trajectory: Trajectory, block_size: int, mask_id: int) -> Strip:
    """One view per denoising step: what step s revealed is scored where all of step ≥ s is masked.

    Raises DirlError where the answer is not whole blocks of this size, since any other was never a state of the
    sampler's.
    """
    if trajectory.block_size not in (None, block_size):
        raise DirlError(
            f"an answer was sampled in blocks of {trajectory.block_size} and the model's are of {block_size}:"
            " set model.block_size as it was"
        )
    token_ids = torch.tensor([*trajectory.prompt_ids, *trajectory.token_ids])
    if len(token_ids) % block_size:
        raise DirlError(
            f"a trajectory of {len(token_ids)} tokens is not whole blocks of {block_size}: keep its last block whole"
        )
    reveal_step = torch.tensor([*[0] * len(trajectory.prompt_ids), *trajectory.reveal_step])
    step = torch.arange(1, int(reveal_step.max()) + 1)[:, None]
    scored = reveal_step == step  # (steps, L)
    return lay_out(token_ids, reveal_step >= step, scored, torch.ones(scored.shape), block_size, mask_id)
