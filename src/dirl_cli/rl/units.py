"""What shares a ratio: a token, a denoising step, an answer; its log-ratio, and what it counts in the loss.

    token     a term of its own for each scored token, as often as it is scored
    position  one for each token of the answer, from all the states it is scored in, by their weights
    step      one for all that a denoising step revealed: the product of its tokens' ratios
    draw      one for each random mask of an answer: the mean over the answer's length of what it scores
    sequence  one for each answer: its weighted mean
    answer    one for each answer: its weighted sum

Shapes: N scored tokens.
"""

import torch
from torch import Tensor

from dirl_cli.diffusion.layout import Rows

LEVELS = ("token", "position", "step", "draw", "sequence", "answer")
LARGEST_LOG_RATIO = 10.0  # nats either way, as in TraceRL's code; from 88 on exp is infinite in fp32


def at_level(level: str, log_ratio: Tensor, rows: Rows) -> Tensor:
    """Each token's own log-ratio (N,) as that of what it shares a ratio with: (N,)."""
    if level == "token":
        return log_ratio
    if level == "step":
        return summed(log_ratio * (rows.weight > 0), unit_index(level, rows))
    weighted = summed(rows.weight * log_ratio, unit_index(level, rows))
    if level in ("position", "answer"):
        return weighted
    if level == "draw":  # whose weights are shares of an estimate that is the mean of all draws
        weighted = weighted * draws_of_answer(rows)
    return weighted / rows.extras["length"]


def token_weights(level: str, rows: Rows) -> Tensor:
    """What each scored token counts (N,), so that what shares a ratio counts once however many tokens it has.

    A token, position or step counts what the views weigh it, an answer as many as its tokens, a draw its share of that.
    """
    if level == "token":
        return rows.weight
    scored = (rows.weight > 0).float()
    share = scored / summed(scored, unit_index(level, rows)).clamp(min=1)
    if level == "position":
        return share
    if level == "step":
        return share * rows.weight
    if level == "draw":
        share = share / draws_of_answer(rows)
    return share * rows.extras["length"]


def unit_index(level: str, rows: Rows) -> Tensor:
    """A number for each scored token (N,), the same for those that share a ratio at this level."""
    sample = rows.extras["sample"]
    if level in ("sequence", "answer"):
        return sample
    coordinates = {
        "position": [rows.at_targets(rows.position)],
        "step": [rows.at_targets(rows.coordinates.block), rows.at_targets(rows.view)],
        "draw": [rows.at_targets(rows.view)],
    }
    return torch.stack([sample, *coordinates[level]]).unique(dim=1, return_inverse=True)[1]


def draws_of_answer(rows: Rows) -> Tensor:
    """How many views score something of a token's answer, its untrained tail included: (N,)."""
    sample = rows.extras["sample"]
    draws = torch.stack([sample, rows.at_targets(rows.view)]).unique(dim=1)
    return draws[0].bincount(minlength=int(sample.max()) + 1)[sample]


def summed(values: Tensor, index: Tensor) -> Tensor:
    """Each value's sum over all that share its index. (N,), (N,) to (N,)."""
    return values.new_zeros(int(index.max()) + 1).index_add(0, index, values)[index]


def ratio_of(log_ratio: Tensor) -> Tensor:
    """π/π_old of log-ratios (N,), of which those beyond ±10 nats count as ±10.

    Out there a ratio has no gradient, as in TraceRL's code. That matters for bad tokens alone, which have become e^10
    times as likely: the clip has stopped all others long before, or their gradient has vanished with the ratio.
    """
    return bounded(log_ratio).exp()


def bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
