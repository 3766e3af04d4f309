"""From hidden states through the language-model head to log-probs, with a backward that recomputes logits once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Scores = tuple[Tensor, Tensor, Tensor]  # (N,) each: log-prob, entropy, and whether it is the likeliest token

TOKENS = 2048  # at once: enough to keep a GPU busy …
LOGITS = 2**28  # … unless the vocabulary is large, since logits are there twice, in fp32: 2 GiB


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens go through a head of so many rows at once."""
    return min(max(LOGITS // vocabulary, 1), TOKENS)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, unsampled_ids: Tensor, chunk: int
) -> Scores:
    """Log-probs of `targets` under softmax(hidden · weightᵀ / temperature); the rest has no gradient.

    hidden: (N, D). weight: (V, D). targets: (N,). temperature: 0 counts as 1. unsampled_ids: left out of the softmax.
    Scores are in fp32; matrix products are taken in autocast's dtype, and `chunk` tokens at a time.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return LinearLogprobs.apply(hidden, weight, targets, temperature or 1.0, unsampled_ids, chunk)


class LinearLogprobs(torch.autograd.Function):
    """Keeps hidden states and each softmax's normaliser; the weight's gradient is summed in the weight's dtype.

    Liger's fused layer sums that gradient in its forward, when it cannot know yet what a loss says of each token.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, unsampled_ids: Tensor, chunk: int
    ) -> Scores:
        ctx.temperature, ctx.chunk = temperature, chunk
        rounded = weight.to(hidden.dtype)
        parts = [
            score(logits_of(part, rounded, temperature, unsampled_ids), ids, unsampled_ids)
            for part, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        logprobs, entropies, likeliest, normalisers = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, unsampled_ids, normalisers)
        ctx.mark_non_differentiable(entropies, likeliest)
        return logprobs, entropies, likeliest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, unsampled_ids, normalisers = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        rounded = weight.to(hidden.dtype)
        for first in range(0, len(hidden), ctx.chunk):
            part = slice(first, first + ctx.chunk)
            slope = steepness(
                logits_of(hidden[part], rounded, ctx.temperature, unsampled_ids),
                targets[part],
                normalisers[part],
                gradient[part] / ctx.temperature,
            ).to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(slope, rounded, out=of_hidden[part])
            if of_weight is not None:
                add_product(of_weight, slope.T, hidden[part])
            del slope  # before there are the next chunk's logits
        return of_hidden, of_weight, None, None, None, None


def logits_of(hidden: Tensor, weight: Tensor, temperature: float, unsampled_ids: Tensor) -> Tensor:
    """Tempered logits in fp32 without the ids that are never sampled: (N, V), all in one place."""
    logits = (hidden @ weight.T).float()
    if temperature != 1:
        logits.div_(temperature)
    return logits.index_fill_(1, unsampled_ids, -torch.inf)


def score(logits: Tensor, targets: Tensor, unsampled_ids: Tensor) -> tuple[Tensor, ...]:
    """Scores of the targets and the softmax's log-normalisers, each (N,); overwrites `logits`."""
    peak, likeliest = logits.max(1, keepdim=True)
    of_target = logits.sub_(peak).gather(1, targets[:, None]).squeeze(1)
    weights = logits.exp()
    mass = weights.sum(1)
    moment = weights.mul_(logits).index_fill_(1, unsampled_ids, 0).sum(1)  # 0 × -inf counts as 0
    log_mass = mass.log()
    return of_target - log_mass, log_mass - moment / mass, likeliest.squeeze(1) == targets, peak.squeeze(1) + log_mass


def steepness(logits: Tensor, targets: Tensor, normalisers: Tensor, of_logprobs: Tensor) -> Tensor:
    """The gradient of hidden · weightᵀ, given that of the log-probs ÷ temperature, in the logits' place."""
    upstream = of_logprobs[:, None]
    probabilities = logits.sub_(normalisers[:, None]).exp_()
    return probabilities.mul_(-upstream).scatter_add_(1, targets[:, None], upstream)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left · right, without a copy where the dtypes are one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
