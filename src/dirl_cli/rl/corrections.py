"""Importance weights for answers that a sampler drew with other probabilities than the trainer's.

An engine of its own rounds otherwise, and answers sampled ahead come from older weights: each is learned from times
π_trainer / π_sampler, bounded so that no answer counts for all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dirl_cli.diffusion.layout import Rows
from dirl_cli.rl.units import at_level, ratio_of


@dataclass(frozen=True)
class Correction:
    """How weights are taken and bounded.

    cap: the largest weight; 0 corrects nothing. floor: the smallest that counts as no outlier.
    level: what shares a weight, see units.py. method: `truncate` lowers larger weights to the cap (TIS); `mask` leaves
    out what is beyond cap or floor (IcePop).
    """

    cap: float
    floor: float = 0.0
    level: str = "token"
    method: str = "truncate"

    def weights(self, rows: Rows, old_logprobs: Tensor, sampler_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of each scored token, and whether it was cut: (N,) each. Log-ratios beyond ±10 count as that."""
        ratio = ratio_of(at_level(self.level, old_logprobs - sampler_logprobs, rows))
        is_cut = (ratio > self.cap) | (ratio < self.floor)
        if self.method == "mask":
            return torch.where(is_cut, 0.0, ratio), is_cut
        return ratio.clamp(max=self.cap), ratio > self.cap
