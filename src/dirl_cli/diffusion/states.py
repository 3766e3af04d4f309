"""The states in which the tokens of a trajectory are scored: what an RL objective takes for their probability.

Views map a trajectory to a strip whose scored tokens are answer tokens (see diffusion/layout.py). Only `Trace`
scores each token in the state that the sampler was in; the others trade exactness for forwards, or follow a paper
written for models without a trace.

Shapes: V views of L tokens, prompt and answer; A answer tokens.
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
    """What views need to know of the model: tokens per block, and the id of the mask token."""

    block_size: int
    mask_id: int


class Views(Protocol):
    """Lays a trajectory out in the states that score it; whatever is random in them comes from `generator`."""

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip: ...


@dataclass(frozen=True)
class Trace:
    """Each token in the very state that revealed it: one view per denoising step of each block (DiRL, eq. 6–8)."""

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        return trajectory_strip(trajectory, spec.block_size, spec.mask_id)


@dataclass(frozen=True)
class MergedTrace:
    """The trace with every `steps` successive steps of a block taken for one (TraceRL, arXiv 2509.06949)."""

    steps: Count

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        merged = [(step + self.steps - 1) // self.steps for step in trajectory.reveal_step]
        return Trace()(replace(trajectory, reveal_step=merged), spec, generator)


@dataclass(frozen=True)
class LeftToRight:
    """Each token given all before it, the rest of its block masked, however it was sampled (arXiv 2601.15165)."""

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        start = len(trajectory.prompt_ids)
        reveal_step = []
        for position in range(start, start + len(trajectory.token_ids)):
            first = max(position // spec.block_size * spec.block_size, start)  # of the block's answer tokens
            reveal_step.append(position - first + 1)
        return Trace()(replace(trajectory, reveal_step=reveal_step), spec, generator)


@dataclass(frozen=True)
class AnswerMasked:
    """All answer tokens at once, the whole answer masked, each prompt token with `prompt_rate` (d1, arXiv 2504.12216).

    One copy of the sequence, in which a block sees the masks of the blocks before it.
    """

    prompt_rate: Share

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        start = len(trajectory.prompt_ids)
        token_ids = torch.tensor([*trajectory.prompt_ids, *trajectory.token_ids])
        position = torch.arange(len(token_ids))
        masked = (torch.rand(len(token_ids), generator=generator) < self.prompt_rate) | (position >= start)  # (L,)
        # The masked sequence stands in the clean copy's place, so that later blocks read masks where an answer was.
        return Strip(
            token_ids=torch.where(masked, spec.mask_id, token_ids),
            sequence=torch.full_like(position, SHARED),
            position=position,
            view=torch.zeros_like(position),
            target_index=position[start:],
            shifted_index=position[start:] - 1,
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

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        rates = self.low + (self.high - self.low) * torch.rand(self.draws, 1, generator=generator)  # (V, 1)
        masked = torch.rand(self.draws, len(trajectory.token_ids), generator=generator) < rates
        masked[0] |= ~masked.any()  # an answer without a scored token would not be trained at all
        return masked_strip(trajectory, spec, masked, torch.full(masked.shape, 1 / self.draws))


@dataclass(frozen=True)
class ComplementaryMasks:
    """A random mask of rate ρ in [low, high] and its complement, weighted 1/2ρ and 1/2(1-ρ) (arXiv 2506.20639)."""

    low: InnerShare
    high: InnerShare

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        rate = self.low + (self.high - self.low) * torch.rand(1, generator=generator)
        masked = torch.rand(len(trajectory.token_ids), generator=generator) < rate
        weight = 0.5 / torch.stack([rate, 1 - rate]).expand(2, len(masked))
        return masked_strip(trajectory, spec, torch.stack([masked, ~masked]), weight)


def masked_strip(trajectory: Trajectory, spec: BlockSpec, masked: Tensor, weight: Tensor) -> Strip:
    """The trajectory in V views, each with these answer tokens masked and scored. masked, weight: (V, A)."""
    prompt = torch.zeros(len(masked), len(trajectory.prompt_ids))  # nothing of it is masked
    masked = torch.cat([prompt.bool(), masked], 1)  # (V, L)
    weight = torch.cat([prompt, weight], 1)
    token_ids = torch.tensor([*trajectory.prompt_ids, *trajectory.token_ids])
    return lay_out(token_ids, masked, masked, weight, spec.block_size, spec.mask_id)


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

    # What step s revealed was hidden up to then, and so was all that came later.
    prompt_steps = [0] * len(trajectory.prompt_ids)  # before the first
    reveal_step = torch.tensor([*prompt_steps, *trajectory.reveal_step])  # (L,)
    step = torch.arange(1, int(reveal_step.max()) + 1)[:, None]  # (V, 1), a view a step
    scored = reveal_step == step  # (V, L)
    masked = reveal_step >= step
    return lay_out(token_ids, masked, scored, torch.ones(scored.shape), block_size, mask_id)
