"""From a causal model to a block-diffusion model by and by: small blocks first, few masks first, both objectives."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.layout import Rows, pack
from dirl_cli.diffusion.masking import Example, Masking, causal_strip
from dirl_cli.diffusion.reveal_order import TraceWindows
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Count, Natural, NotNegative, Share, SomeShare
from dirl_cli.sft.batches import Noise
from dirl_cli.training.block_stages import BlockStages


@dataclass(frozen=True)
class Annealing:
    """What changes over the first `share` of the steps, and the causal loss beside.

    block_sizes: those to begin with, in equal parts of it. masked: the share of what the schedule hides that is
    hidden at first; it grows to 1. causal_weight: of the next-token loss, which all steps have.
    patience: where it is given, each size lasts instead until what is held out has not improved for so many
    evaluations; least_steps, most_steps: how long at the least and at the most.
    """

    block_sizes: tuple[Count, ...]
    share: Share
    masked: SomeShare
    causal_weight: NotNegative
    patience: Count | None = None
    least_steps: Natural = 0
    most_steps: Count | None = None

    def check(self, block_size: int) -> None:
        """Raises DirlError for what cannot lead to blocks of this size."""
        sizes = [*self.block_sizes, block_size]
        if any(following % size for size, following in pairwise(sizes)):
            raise DirlError(
                f"annealing.block_sizes={list(self.block_sizes)}: each must divide the next, up to {block_size}"
            )
        if self.patience is None and (self.least_steps or self.most_steps):
            raise DirlError(
                "annealing.least_steps and annealing.most_steps bound what annealing.patience ends: give that, or"
                " annealing.share alone"
            )
        if self.patience and not self.block_sizes:
            raise DirlError("annealing.patience is of annealing.block_sizes: name the sizes to begin with")
        if self.most_steps and self.most_steps < self.least_steps:
            raise DirlError(
                f"annealing.most_steps={self.most_steps} is less than annealing.least_steps={self.least_steps}"
            )

    def require_evaluations(self, eval_every: int) -> None:
        """Raises DirlError where evaluations are to end the stages, and there are none on the way."""
        if self.patience and not eval_every:
            raise DirlError("annealing.patience counts evaluations: give eval_every=N, or annealing.share alone")

    def stages(self, final: int, metric: str) -> BlockStages | None:
        """The stages that `metric` ends, on the way to blocks of `final`; None where they have set ends."""
        if self.patience is None:
            return None
        sizes = tuple(size for size in self.block_sizes if size != final)
        return BlockStages(sizes, final, metric, self.patience, self.least_steps, self.most_steps)

    def require_whole_states(self, masking: Masking | TraceWindows) -> None:
        """Raises DirlError where part of what a trace hides is to be shown, which no sampler ever saw."""
        if isinstance(masking, TraceWindows) and self.masked < 1:
            raise DirlError(
                f"annealing.masked={self.masked:g} shows some of what masking=trace hides, and its states would be no"
                " sampler's: give annealing.masked=1"
            )

    def block_size(self, final: int, progress: float) -> int:
        """The block size at a point of the run, of which `final` is that of its end. progress: from 0 to 1."""
        if progress >= self.share or not self.block_sizes:
            return final
        return self.block_sizes[int(progress / self.share * len(self.block_sizes))]

    def noise(self, final: Noise, progress: float, block_size: int | None = None) -> Noise:
        """The noise at a point of the run, of which `final` is that of its end. progress: from 0 to 1.

        block_size: of the stage that the run is in, where stages have no set ends.
        """
        if block_size is None:
            block_size = self.block_size(final.block_size, progress)
        if progress >= self.share and block_size == final.block_size:
            return final
        if progress >= self.share or isinstance(final.masking, TraceWindows):
            return replace(final, block_size=block_size)
        masked = self.masked + (1 - self.masked) * progress / self.share
        return replace(final, block_size=block_size, masking=Thinned(final.masking, masked))

    def causal_rows(self, examples: Iterable[Example], noise: Noise) -> list[Rows]:
        """The demonstrations as a causal model learns them; none where that has no weight."""
        if not self.causal_weight:
            return []
        strips = [causal_strip(one, self.causal_weight) for one in examples]
        return [pack(strips, noise.row_tokens, block_size=1, pad_id=noise.pad_id)]


@dataclass(frozen=True)
class Thinned:
    """A masking schedule of which only a share is hidden, each token counting so much the more.

    Of a view of which nothing would be hidden one token is, so that there is something to learn from.
    """

    masking: Masking
    share: float

    def __call__(self, block: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        masked, weight = self.masking(block, generator)
        return thinned(masked, weight, torch.rand(masked.shape, generator=generator), self.share)


def thinned(masked: Tensor, weight: Tensor, lottery: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Of the masked tokens those whose lot is below `share`, or else the one with the lowest, and their weights.

    All are (V, n). lottery: uniform numbers. A token of m that are masked stays hidden with probability
    share + (1 - share)^m / m, and counts the inverse of that, so that it counts as often as before.
    """
    lowest = lottery.masked_fill(~masked, torch.inf).amin(-1, keepdim=True)
    stays = masked & (lottery <= lowest.clamp(min=share))
    count = masked.sum(-1, keepdim=True).clamp(min=1)  # a view that hid nothing has no weight to correct
    return stays, weight / (share + (1 - share) ** count / count)
