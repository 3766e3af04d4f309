"""The states in which the tokens of a trajectory are scored: what an RL objective takes for their probability.

Views map a trajectory to a strip whose scored tokens are answer tokens (see diffusion/layout.py). Only `Trace`
scores each token in the state that the sampler was in; the others trade exactness for forwards, or follow a paper
written for models without a trace.

Tokens that were held (the hint of an answer, see rl/hints.py) are given: shown in every view, and scored in none.

Shapes: V views of L tokens, prompt and answer; A answer tokens, F of them revealed by denoising steps: all but those
held.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.layout import SHARED, Strip, lay_out
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Count, InnerShare, OneOf, Share
from dirl_cli.types import HELD, Trajectory


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
class SampledTrace:
    """Some of the trace's denoising steps, each in the very state that revealed its tokens (AGRPO, arXiv 2510.04019).

    steps: how many of an answer's S steps; of no more than that, all. choose: `uniform`; `surprisal`, more often the
    steps whose tokens had low log-probs when they were drawn; or `most_surprising`, those with the lowest mean.
    The first two weigh a step by one over how often it is expected to be taken, so that the sums over the tokens
    taken are those of the whole trace on average; the last weighs each S / steps, and is biased.
    """

    steps: Count
    choose: Annotated[str, OneOf("uniform", "surprisal", "most_surprising")]

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        revealed = revealed_tokens(trajectory)  # (F,)
        block = (len(trajectory.prompt_ids) + revealed) // spec.block_size
        step_of_token = torch.stack([block, as_integers(trajectory.reveal_step)[revealed]])  # (2, F)
        steps, index = step_of_token.unique(dim=1, return_inverse=True)  # (2, S) and (F,)
        step_weight = self._weights(mean_surprisals(trajectory, index, steps.shape[1]), generator)  # (S,)
        weight = torch.zeros(len(trajectory.token_ids))
        weight[revealed] = step_weight[index]
        return trajectory_strip(trajectory, spec.block_size, spec.mask_id, weight)

    def _weights(self, surprisal: Tensor, generator: Generator) -> Tensor:
        """What each step's tokens count (S,), 0 for steps not taken, from its tokens' mean surprisal (S,)."""
        total = len(surprisal)
        if self.steps >= total:
            return torch.ones(total)
        if self.choose == "most_surprising":
            weights = torch.zeros(total)
            weights[surprisal.topk(self.steps).indices] = total / self.steps
            return weights

        # Half of the chance is shared out evenly, so that no weight is above twice the uniform one.
        chance = torch.full((total,), 1 / total, dtype=torch.float64)
        if self.choose == "surprisal" and surprisal.sum() > 0:
            chance = (chance + surprisal / surprisal.sum()) / 2
        expected = self.steps * chance
        return (systematic_counts(expected, generator) / expected).float()


def mean_surprisals(trajectory: Trajectory, index: Tensor, steps: int) -> Tensor:
    """-log p of the tokens that each step revealed, their mean in nats: (S,). index: (F,), each token's step.

    All 0 for a trajectory without log-probs, such as one that is only counted.
    """
    if not trajectory.logprobs:
        return torch.zeros(steps, dtype=torch.float64)
    surprisal = -torch.from_numpy(np.array(trajectory.logprobs, np.float64))[revealed_tokens(trajectory)]
    totals = torch.zeros(steps, dtype=torch.float64).index_add(0, index, surprisal)
    return (totals / index.bincount(minlength=steps)).clamp(min=0)


def systematic_counts(expected: Tensor, generator: Generator) -> Tensor:
    """How often each of S is drawn (S,), on average `expected`, and never one or more away from it.

    Systematic sampling: points at distance 1 from a random start, each counted where the running sum passes it.
    """
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    passed = (expected.cumsum(0) + offset).floor()
    return passed.diff(prepend=torch.zeros(1, dtype=torch.float64))


@dataclass(frozen=True)
class LeftToRight:
    """The next `tokens` of a block at once, given all before them and the rest of the block masked.

    However they were sampled; one token at a time is JustGRPO (arXiv 2601.15165).
    """

    tokens: Count = 1

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        reveal_step = []
        number = 0  # tokens so far of the block that are not held
        for position, step in enumerate(trajectory.reveal_step, start=len(trajectory.prompt_ids)):
            if position % spec.block_size == 0:
                number = 0
            if step == HELD:
                reveal_step.append(HELD)
            else:
                reveal_step.append(number // self.tokens + 1)
                number += 1
        return Trace()(replace(trajectory, reveal_step=reveal_step), spec, generator)


@dataclass(frozen=True)
class AnswerMasked:
    """All answer tokens at once, the whole answer masked, each prompt token with `prompt_rate` (d1, arXiv 2504.12216).

    One copy of the sequence, in which a block sees the masks of the blocks before it.
    """

    prompt_rate: Share

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        start = len(trajectory.prompt_ids)
        token_ids = all_ids(trajectory)
        position = torch.arange(len(token_ids))
        masked = (torch.rand(len(token_ids), generator=generator) < self.prompt_rate) & (position < start)  # (L,)
        scored = start + revealed_tokens(trajectory)  # (F,)
        masked[scored] = True
        # The masked sequence stands in the clean copy's place, so that later blocks read masks where an answer was.
        return Strip(
            token_ids=torch.where(masked, spec.mask_id, token_ids),
            sequence=torch.full_like(position, SHARED),
            position=position,
            view=torch.zeros_like(position),
            target_index=scored,
            shifted_index=scored - 1,
            targets=token_ids[scored],
            weight=torch.ones(len(scored)),
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
        masked = torch.rand(self.draws, trajectory.num_revealed, generator=generator) < rates
        masked[0] |= ~masked.any()  # an answer without a scored token would not be trained at all
        return masked_strip(trajectory, spec, masked, torch.full(masked.shape, 1 / self.draws))


@dataclass(frozen=True)
class ComplementaryMasks:
    """A random mask of rate ρ in [low, high] and its complement, weighted 1/2ρ and 1/2(1-ρ) (arXiv 2506.20639)."""

    low: InnerShare
    high: InnerShare

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        rate = self.low + (self.high - self.low) * torch.rand(1, generator=generator)
        masked = torch.rand(trajectory.num_revealed, generator=generator) < rate
        weight = 0.5 / torch.stack([rate, 1 - rate]).expand(2, len(masked))
        return masked_strip(trajectory, spec, torch.stack([masked, ~masked]), weight)


@dataclass(frozen=True)
class CoupledMasks:
    """The answer masked whole, and a mask of rate ρ in [low, high] with its complement (DiffuCoder, arXiv 2506.20639).

    Weighted 1/2, 1/2ρ and 1/2(1-ρ), so that each token is scored twice: as DiffuCoder's authors released it. A block
    sees clean blocks before it in all three.
    """

    low: InnerShare
    high: InnerShare

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        rate = self.low + (self.high - self.low) * torch.rand(1, generator=generator)
        masked = torch.rand(trajectory.num_revealed, generator=generator) < rate
        weight = 0.5 / torch.stack([torch.ones(1), rate, 1 - rate]).expand(3, len(masked))
        return masked_strip(trajectory, spec, torch.stack([torch.ones_like(masked), masked, ~masked]), weight)


@dataclass(frozen=True)
class BlockMasks:
    """In each draw k of the n tokens of every block masked, k uniform in 1 … n, weighted n/k: the evidence bound.

    The sum of the weighted log-probs is on average the ELBO of block diffusion, every order equally likely (EBPO,
    arXiv 2602.08676). k is stratified over draws and blocks. Several draws are averaged.
    """

    draws: Count

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        position = len(trajectory.prompt_ids) + revealed_tokens(trajectory)  # (F,)
        block, sizes = (position // spec.block_size).unique_consecutive(return_inverse=True, return_counts=True)[1:]

        # One level of noise for each draw and block, one in each of as many equal intervals.
        cells = self.draws * len(sizes)
        noise = torch.randperm(cells, generator=generator) + torch.rand(cells, generator=generator)
        hidden = (noise.view(self.draws, -1) / cells * sizes).long().clamp(max=sizes - 1) + 1  # (V, blocks), the k

        # A random order of each block's tokens: those of block b sort between b and b + 1.
        keys = block + torch.rand(self.draws, len(position), generator=generator, dtype=torch.float64)  # (V, F)
        first_of_block = sizes.cumsum(0) - sizes
        rank = keys.argsort(1).argsort(1) - first_of_block[block]
        masked = rank < hidden[:, block]
        weight = (sizes / hidden / self.draws)[:, block]
        return masked_strip(trajectory, spec, masked, weight)


@dataclass(frozen=True)
class QuadratureMasks:
    """The ELBO's integral over the masking rate by `nodes` Gauss-Legendre points (GDPO, arXiv 2510.08554).

    At a point t of weight w, round(t A) of the A answer tokens are masked, at least one, and weighted w/t. The rates
    are not drawn, so that the error of two or three points is a bias that is the same for every answer.
    """

    nodes: Count

    def __post_init__(self) -> None:
        if self.nodes not in GAUSS_LEGENDRE:
            raise DirlError(f"algo.views.nodes={self.nodes}: give {' or '.join(map(str, GAUSS_LEGENDRE))}")

    def __call__(self, trajectory: Trajectory, spec: BlockSpec, generator: Generator) -> Strip:
        length = trajectory.num_revealed
        masked = []
        weight = []
        for rate, share in GAUSS_LEGENDRE[self.nodes]:
            rank = torch.rand(length, generator=generator).argsort().argsort()
            masked.append(rank < max(round(rate * length), 1))
            weight.append(torch.full((length,), share / rate))
        return masked_strip(trajectory, spec, torch.stack(masked), torch.stack(weight))


GAUSS_LEGENDRE = {  # nodes and weights on [0, 1]
    2: ((0.5 - 0.5 / 3**0.5, 0.5), (0.5 + 0.5 / 3**0.5, 0.5)),
    3: ((0.5 - 0.5 * 0.6**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.5 * 0.6**0.5, 5 / 18)),
}


def all_ids(trajectory: Trajectory) -> Tensor:
    """The ids of the prompt and of the answer: (L,)."""
    return torch.cat([as_integers(trajectory.prompt_ids), as_integers(trajectory.token_ids)])


def revealed_tokens(trajectory: Trajectory) -> Tensor:
    """Which of the answer's tokens denoising steps revealed: (F,) indices, all but those that were held."""
    return (as_integers(trajectory.reveal_step) != HELD).nonzero().squeeze(1)


def as_integers(values: Sequence[int]) -> Tensor:
    """Values of a list or array, (n,)."""
    return torch.from_numpy(np.array(values, np.int64))


def as_floats(values: Sequence[float]) -> Tensor:
    """The same of floats, as float32."""
    return torch.from_numpy(np.array(values, np.float32))


def masked_strip(trajectory: Trajectory, spec: BlockSpec, masked: Tensor, weight: Tensor) -> Strip:
    """The trajectory in V views, each with these answer tokens masked and scored. masked, weight: (V, F)."""
    token_ids = all_ids(trajectory)
    position = len(trajectory.prompt_ids) + revealed_tokens(trajectory)  # nothing else is masked
    everywhere = torch.zeros(len(masked), len(token_ids), dtype=torch.bool)  # (V, L)
    everywhere[:, position] = masked
    weights = torch.zeros(everywhere.shape)
    weights[:, position] = weight
    return lay_out(token_ids, everywhere, everywhere, weights, spec.block_size, spec.mask_id)


def trajectory_strip(trajectory: Trajectory, block_size: int, mask_id: int, weight: Tensor | None = None) -> Strip:
    """One view per denoising step: what step s revealed is scored where all of step ≥ s is masked.

    weight: (A,) of each answer token, 1 unless given; what has none is not scored, and its state not laid out.

    Raises DirlError where the answer is not whole blocks of this size, since any other was never a state of the
    sampler's.
    """
    if trajectory.block_size not in (None, block_size):
        raise DirlError(
            f"an answer was sampled in blocks of {trajectory.block_size} and the model's are of {block_size}:"
            " set model.block_size as it was"
        )
    token_ids = all_ids(trajectory)
    if len(token_ids) % block_size:
        raise DirlError(
            f"a trajectory of {len(token_ids)} tokens is not whole blocks of {block_size}: keep its last block whole"
        )

    # What step s revealed was hidden up to then, and so was all that came later.
    prompt = len(trajectory.prompt_ids)
    reveal_step = torch.full((len(token_ids),), HELD)  # (L,), a prompt's before the first
    reveal_step[prompt:] = as_integers(trajectory.reveal_step)
    step = torch.arange(1, int(reveal_step.max()) + 1)[:, None]  # (V, 1), a view a step
    token_weight = torch.ones(len(token_ids))  # (L,)
    if weight is not None:
        token_weight[prompt:] = weight
    scored = (reveal_step == step) & (token_weight > 0)  # (V, L)
    masked = reveal_step >= step
    return lay_out(token_ids, masked, scored, token_weight.expand(scored.shape), block_size, mask_id)
