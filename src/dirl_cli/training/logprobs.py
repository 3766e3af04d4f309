"""Log-probabilities of the scored tokens of packed rows, without ever holding all logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dirl_cli.diffusion.layout import Rows, pack
from dirl_cli.diffusion.sampling import entropy, temper, truncate
from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.models.attention import hidden_states
from dirl_cli.models.load import DiffusionLM, is_shifted
from dirl_cli.types import Decoding, Trajectory

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
            slope = logit_gradient(
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


def logit_gradient(logits: Tensor, targets: Tensor, normalisers: Tensor, of_logprobs: Tensor) -> Tensor:
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


class TokenScorer(nn.Module):
    """Scores tokens in the states in which `Rows` shows them.

    unsampled_ids: left out of the softmax; empty for fine-tuning, as published checkpoints were trained.
    decoding: its temperature, top-k and top-p shape the softmax as they did when the tokens were drawn.
    chunk: how many tokens go through the language-model head at once (default: 2048, fewer where their logits
    would take more than 2 GiB); their logits are recomputed in the backward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        unsampled_ids: Sequence[int] = (),
        decoding: Decoding | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # the layers that Accelerate shards one by one
        self.decoding = decoding or Decoding(temperature=1.0)
        self.chunk = chunk or tokens_at_once(model.config.vocab_size)
        self.unsampled: Tensor
        self.register_buffer("unsampled", torch.tensor(unsampled_ids, dtype=torch.long), persistent=False)

    def forward(self, rows: Rows) -> Scores:
        """Log-probability and entropy in nats, in fp32, of the N scored tokens, and whether each is the likeliest."""
        predicted_at = rows.before if is_shifted(self.model) else rows.where
        hidden = hidden_states(self.model, rows).flatten(0, 1)[predicted_at]  # (N, D)
        head, options = self.model.get_output_embeddings(), self.decoding
        if is_plain(head) and not options.truncates:
            return linear_logprobs(hidden, head.weight, rows.targets, options.temperature, self.unsampled, self.chunk)
        parts = [
            checkpoint(self._score, *part, use_reentrant=False) if torch.is_grad_enabled() else self._score(*part)
            for part in zip(hidden.split(self.chunk), rows.targets.split(self.chunk), strict=True)
        ]
        logprobs, entropies, likeliest = (torch.cat(each) for each in zip(*parts, strict=True))
        return logprobs, entropies, likeliest

    def _score(self, hidden: Tensor, targets: Tensor) -> Scores:
        options = self.decoding
        logits = temper(self.model.get_output_embeddings()(hidden), options.temperature, self.unsampled)
        if options.temperature:  # greedy decoding truncates nothing
            # a token drawn from other weights may lie outside today's top-k or top-p, and still needs a finite score
            kept = truncate(logits, options.top_k, options.top_p)
            logits = kept.scatter(-1, targets[:, None], logits.gather(-1, targets[:, None]))
        logprobs = logits.log_softmax(-1)
        of_target = logprobs.gather(-1, targets[:, None]).squeeze(-1)
        return of_target, entropy(logprobs.detach()), logprobs.argmax(-1) == targets


def is_plain(head: nn.Module) -> bool:
    """Whether calling a head is the product with its weight and nothing else: no adapter, no hook, no bias."""
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    return type(head) is nn.Linear and [name for name, _ in head.named_parameters()] == ["weight"] and not hooked


@torch.no_grad()
def trajectory_logprobs(
    lm: DiffusionLM,
    trajectories: Sequence[Trajectory],
    decoding: Decoding | None = None,
    row_tokens: int = 4096,
    rows_each: int = 1,
) -> list[list[float]]:
    """Each answer token's log-probability in the state in which it was revealed, one list a trajectory.

    decoding: how the tokens were drawn (default: temperature 1, nothing truncated; 0 counts as 1).
    """
    scorer = TokenScorer(lm.model, lm.unsampled_ids, decoding).to(lm.device)
    strips = [trajectory_strip(one, lm.block_size, lm.mask_token_id) for one in trajectories]
    found = [[0.0] * len(one.token_ids) for one in trajectories]
    for rows in pack(strips, row_tokens, lm.block_size, lm.pad_token_id).split(rows_each) if strips else []:
        logprobs, *_ = scorer(rows.to(lm.device))
        places = zip(rows.scored(rows.group).tolist(), rows.scored(rows.position).tolist(), strict=True)
        for (which, position), logprob in zip(places, logprobs.tolist(), strict=True):
            found[which][position - len(trajectories[which].prompt_ids)] = logprob
    return found
