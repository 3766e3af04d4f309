"""Bounds of an answer's log-prob from its random masks: from below where it was good, also from above where it was bad.

SPG (arXiv 2510.09541, facebookresearch/SPG spg_trainer.py): raising a lower bound raises log p, but lowering one need
not lower it, so that bad answers are learned from an upper bound.

Shapes: N scored tokens.
"""

import torch
from torch import Tensor

from dirl_cli.diffusion.layout import Rows
from dirl_cli.rl.units import summed, unit_index


def bound_score(rows: Rows, logprobs: Tensor, upper_power: float, upper_share: float) -> Tensor:
    """The bound that stands for the log-prob of each token's answer, per token of it: (N,).

    Where the advantage is positive the mean log-prob of masked tokens (the ELBO without its 1/ρ); else
    upper_share × EUBO + (1 - upper_share) × that mean, with

        EUBO = 1/β · mean over tokens of log( 1/n Σ_draws [masked] p^β / ρ ),   β = upper_power,

    ρ the share of its block that was masked with the token: 1/ρ is the weight of `BlockMasks`, times its draws n.
    """
    sample = rows.extras["sample"]
    scored = (rows.weight > 0).float()
    lower = mean_of_answer(logprobs, scored, sample)

    # A token's draws are summed in the log domain: its power's largest is taken out first.
    position = unit_index("position", rows)
    power = (upper_power * logprobs).masked_fill(scored == 0, -torch.inf)
    peak = power.detach().new_full((int(position.max()) + 1,), -torch.inf)
    peak = peak.scatter_reduce(0, position, power.detach(), "amax")[position]
    peak = peak.masked_fill(peak.isinf(), 0.0)
    mean_power = summed((power - peak).exp() * rows.weight, position)  # the weights hold 1/(n ρ)
    upper_of_token = (mean_power.clamp(min=torch.finfo(power.dtype).tiny).log() + peak) / upper_power
    per_position = scored / summed(scored, position).clamp(min=1)  # a token counts once, however often it was masked
    upper = mean_of_answer(upper_of_token, per_position, sample)

    mixed = upper_share * upper + (1 - upper_share) * lower
    return torch.where(rows.extras["advantage"] >= 0, lower, mixed)


def mean_of_answer(values: Tensor, weight: Tensor, sample: Tensor) -> Tensor:
    """The weighted mean of each token's answer: (N,) from (N,)."""
    return summed(weight * values, sample) / summed(weight, sample).clamp(min=torch.finfo(weight.dtype).tiny)
