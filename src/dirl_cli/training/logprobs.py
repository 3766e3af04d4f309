"""Log-probabilities of the scored tokens of packed rows, without ever holding all logits.

Shapes: N scored tokens of a micro-batch, C of them in a chunk, D the width of a hidden state, V the vocabulary.

    hidden            (N, D)  states at the positions that predict the scored tokens
    weight            (V, D)  of the language-model head; logits = hidden · weightᵀ, of which only (C, V) exist at once
    targets           (N,)    ids of the scored tokens
    logprobs          (N,)    in nats, fp32
    entropies         (N,)    of the softmax, in nats, fp32
    is_likeliest      (N,)    whether the target is the token that greedy decoding takes
    normalisers       (N,)    log Σ exp(logits): kept for the backward, so that it needs no second softmax
"""

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
from dirl_cli.models.attention import states_at
from dirl_cli.models.context import UNDIVIDED, ContextGroup
from dirl_cli.models.load import DiffusionLM, is_shifted
from dirl_cli.types import Decoding, Trajectory

Scores = tuple[Tensor, Tensor, Tensor]  # logprobs, entropies and is_likeliest, (N,) each

CHUNK_TOKENS = 2048  # enough to keep a GPU busy …
CHUNK_LOGITS = 2**28  # … unless the vocabulary is large, since logits are there twice, in fp32: 2 GiB


def tokens_at_once(vocabulary: int) -> int:
    """The default chunk: how many tokens go through the language-model head at once, for a vocabulary of this size."""
    return min(max(CHUNK_LOGITS // vocabulary, 1), CHUNK_TOKENS)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    unsampled_ids: Tensor,
    chunk: int,
    entropy_temperature: float | None = None,
) -> Scores:
    """Scores of `targets` under softmax(hidden · weightᵀ / temperature); log-probs and entropies have a gradient.

    hidden: (N, D). weight: (V, D). targets: (N,). temperature: 0 counts as 1.
    unsampled_ids: (U,), left out of the softmax. chunk: tokens whose logits exist at once.
    entropy_temperature: that of the softmax whose entropies are taken; None for the same one.
    Scores are in fp32; matrix products are taken in autocast's dtype.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    temperature = temperature or 1.0
    sharpness = temperature / (entropy_temperature or temperature)
    return LinearLogprobs.apply(hidden, weight, targets, temperature, unsampled_ids, chunk, sharpness)


class LinearLogprobs(torch.autograd.Function):
    """Keeps hidden states and each softmax's normaliser; the weight's gradient is summed in the weight's dtype.

    sharpness: entropies are those of the softmax of the logits times this, log-probs of the logits as they are.
    Liger's fused layer sums that gradient in its forward, when it cannot know yet what a loss says of each token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        unsampled_ids: Tensor,
        chunk: int,
        sharpness: float,
    ) -> Scores:
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.sharpness = sharpness
        ctx.set_materialize_grads(False)  # so that entropies that nothing is learned from cost nothing
        cast_weight = weight.to(hidden.dtype)

        # Only the normaliser of each softmax stays, from which the backward makes its gradient.
        chunks = []
        for chunk_hidden, chunk_targets in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = tempered_logits(chunk_hidden, cast_weight, temperature, unsampled_ids)
            chunks.append(score_targets(logits, chunk_targets, unsampled_ids, sharpness))
            del logits  # before there are the next chunk's
        logprobs, entropies, is_likeliest, normalisers, sharp_normalisers = (
            torch.cat(column) for column in zip(*chunks, strict=True)
        )

        ctx.save_for_backward(hidden, weight, targets, unsampled_ids, normalisers, entropies, sharp_normalisers)
        ctx.mark_non_differentiable(is_likeliest)
        return logprobs, entropies, is_likeliest

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logprob_gradient: Tensor | None, entropy_gradient: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, unsampled_ids, normalisers, entropies, sharp_normalisers = ctx.saved_tensors
        if logprob_gradient is None:
            logprob_gradient = torch.zeros_like(normalisers)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        cast_weight = weight.to(hidden.dtype)

        # Logits are computed again, chunk by chunk as in the forward, and turned into their gradient in place.
        for start in range(0, len(hidden), ctx.chunk):
            chunk = slice(start, start + ctx.chunk)
            of_entropies = None
            if entropy_gradient is not None:
                of_entropies = entropy_gradient[chunk] / (ctx.temperature / ctx.sharpness)
            of_logits = logit_gradient(
                tempered_logits(hidden[chunk], cast_weight, ctx.temperature, unsampled_ids).sub_(
                    normalisers[chunk, None]
                ),
                targets[chunk],
                entropies[chunk],
                logprob_gradient[chunk] / ctx.temperature,
                of_entropies,
                ctx.sharpness,
                sharp_normalisers[chunk],
            ).to(hidden.dtype)
            if hidden_gradient is not None:
                torch.mm(of_logits, cast_weight, out=hidden_gradient[chunk])
            if weight_gradient is not None:
                add_product(weight_gradient, of_logits.T, hidden[chunk])
            del of_logits  # before there are the next chunk's logits
        return hidden_gradient, weight_gradient, None, None, None, None, None


def tempered_logits(hidden: Tensor, weight: Tensor, temperature: float, unsampled_ids: Tensor) -> Tensor:
    """Logits ÷ temperature in fp32, -inf for the ids that are never sampled: (C, V) from (C, D) and (V, D).

    Everything after the product works in place: a chunk's logits are the largest tensor there is.
    """
    logits = (hidden @ weight.T).float()
    if temperature != 1:
        logits.div_(temperature)
    return logits.index_fill_(1, unsampled_ids, -torch.inf)


def score_targets(
    logits: Tensor, targets: Tensor, unsampled_ids: Tensor, sharpness: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, whether likeliest and two log-normalisers, each (C,), of logits (C, V): it overwrites them.

    With z = logits - max and Z = Σ exp(z): log-prob = z[target] - log Z, entropy = log Z - Σ exp(z) z / Z.
    Entropies are of p^sharpness / Σ p^sharpness, the distribution p for sharpness 1; log Σ p^sharpness comes last.
    """
    # With the largest logit at 0 no exponential overflows, and the largest is 1: no sum of them is 0.
    peak, argmax = logits.max(1, keepdim=True)  # (C, 1)
    target_logit = logits.sub_(peak).gather(1, targets[:, None]).squeeze(1)
    weights = logits.exp()  # (C, V)
    mass = weights.sum(1)
    log_mass = mass.log()
    logprobs = target_logit - log_mass
    is_likeliest = argmax.squeeze(1) == targets

    # The same sums of the logits that the entropies are of, in the same memory.
    sharp_mass, sharp_log_mass = mass, log_mass
    if sharpness != 1:
        torch.exp(logits.mul_(sharpness), out=weights)
        sharp_mass = weights.sum(1)
        sharp_log_mass = sharp_mass.log()
    weighted_logits = weights.mul_(logits).index_fill_(1, unsampled_ids, 0).sum(1)  # 0 × -inf counts as 0
    entropies = sharp_log_mass - weighted_logits / sharp_mass
    return logprobs, entropies, is_likeliest, peak.squeeze(1) + log_mass, sharp_log_mass - sharpness * log_mass


def logit_gradient(
    log_distribution: Tensor,
    targets: Tensor,
    entropies: Tensor,
    of_logprobs: Tensor,
    of_entropies: Tensor | None,
    sharpness: float,
    sharp_normalisers: Tensor,
) -> Tensor:
    """Gradient of the loss with respect to hidden · weightᵀ, (C, V), in the memory of `log_distribution`.

    log_distribution: log p, (C, V), -inf for ids that are never sampled. targets, entropies: (C,).
    of_logprobs, of_entropies: (C,), gradients of the loss with respect to these, ÷ the temperature of each.
    sharpness, sharp_normalisers: see `score_targets`; entropies H are of q = p^sharpness / Σ p^sharpness.
    The log-prob of target t has the gradient 1[v = t] - p[v], the entropy H that of -q[v] (log q[v] + H).
    """
    entropy_part = None
    if of_entropies is not None:
        lowest = torch.finfo(log_distribution.dtype).min / 2  # 0 × -inf would be nan
        if sharpness == 1:
            entropy_part = log_distribution.exp()
            finite = log_distribution.clamp(min=lowest)
        else:
            finite = (log_distribution * sharpness).sub_(sharp_normalisers[:, None])
            entropy_part = finite.exp()
            finite.clamp_(min=lowest)
        entropy_part.mul_(finite.add_(entropies[:, None])).mul_(-of_entropies[:, None])
        del finite

    upstream = of_logprobs[:, None]
    gradient = log_distribution.exp_().mul_(-upstream).scatter_add_(1, targets[:, None], upstream)
    if entropy_part is not None:
        gradient.add_(entropy_part)
    return gradient


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (V, D) += left (V, C) · right (C, D), without a copy where the dtypes are one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class LogprobModel(nn.Module):
    """A language model whose forward takes `Rows` and gives the log-probs of their scored tokens.

    unsampled_ids: left out of the softmax; empty for fine-tuning, as published checkpoints were trained.
    decoding: its temperature, top-k and top-p shape the softmax as they did when the tokens were drawn.
    entropy_temperature: of the softmax whose entropies are taken, where it is another.
    chunk: how many tokens go through the language-model head at once (default: 2048, fewer where their logits
    would take more than 2 GiB); their logits are recomputed in the backward.
    context: the processes that divide rows among them, all of which are to call with the same ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        unsampled_ids: Sequence[int] = (),
        decoding: Decoding | None = None,
        chunk: int | None = None,
        entropy_temperature: float | None = None,
        context: ContextGroup = UNDIVIDED,
    ) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # the layers that Accelerate shards one by one
        self.decoding = decoding or Decoding(temperature=1.0)
        self.chunk = chunk or tokens_at_once(model.config.vocab_size)
        self.entropy_temperature = entropy_temperature
        self.context = context
        self.unsampled: Tensor
        self.register_buffer("unsampled", torch.tensor(unsampled_ids, dtype=torch.long), persistent=False)

    def forward(self, rows: Rows) -> Scores:
        """Log-probability and entropy in nats, in fp32, of the N scored tokens, and whether each is the likeliest."""
        hidden, own = states_at(self.model, rows, self.context, is_shifted(self.model))
        logprobs, entropies, is_likeliest = self._scores(hidden, rows.targets[own])
        if self.context.size == 1:
            return logprobs, entropies, is_likeliest
        count = len(rows.targets)
        return (
            self.context.gather(logprobs, own, count),
            self.context.gather(entropies, own, count),
            self.context.gather(is_likeliest.float(), own, count).bool(),
        )

    def _scores(self, hidden: Tensor, targets: Tensor) -> Scores:
        """Scores (n,) from hidden states (n, D) and targets (n,)."""
        head = self.model.get_output_embeddings()
        options = self.decoding
        if is_plain(head) and not options.truncates:
            return linear_logprobs(
                hidden, head.weight, targets, options.temperature, self.unsampled, self.chunk, self.entropy_temperature
            )

        # Another head, such as one with an adapter, is called as it is; checkpointing keeps its logits from adding up.
        chunks = []
        for hidden_and_targets in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True):
            if torch.is_grad_enabled():
                chunks.append(checkpoint(self._score, *hidden_and_targets, use_reentrant=False))
            else:
                chunks.append(self._score(*hidden_and_targets))
        logprobs, entropies, is_likeliest = (torch.cat(column) for column in zip(*chunks, strict=True))
        return logprobs, entropies, is_likeliest

    def _score(self, hidden: Tensor, targets: Tensor) -> Scores:
        """Scores (C,) from hidden states (C, D) and targets (C,) through the head as a module."""
        options = self.decoding
        logits = temper(self.model.get_output_embeddings()(hidden), options.temperature, self.unsampled)
        if options.temperature:  # greedy decoding truncates nothing
            # A token drawn from other weights may lie outside today's top-k or top-p, and still needs a finite score.
            truncated = truncate(logits, options.top_k, options.top_p)
            logits = truncated.scatter(-1, targets[:, None], logits.gather(-1, targets[:, None]))

        logprobs = logits.log_softmax(-1)  # (C, V)
        target_logprobs = logprobs.gather(-1, targets[:, None]).squeeze(-1)
        is_likeliest = logprobs.argmax(-1) == targets
        if self.entropy_temperature:
            logprobs = (logprobs * ((options.temperature or 1.0) / self.entropy_temperature)).log_softmax(-1)
        return target_logprobs, entropy(logprobs), is_likeliest


def is_plain(head: nn.Module) -> bool:
    """Whether calling a head is the product with its weight and nothing else: no adapter, no hook, no bias."""
    is_hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    return type(head) is nn.Linear and [name for name, _ in head.named_parameters()] == ["weight"] and not is_hooked


@torch.no_grad()
def trajectory_logprobs(
    lm: DiffusionLM,
    trajectories: Sequence[Trajectory],
    decoding: Decoding | None = None,
    row_tokens: int = 4096,
    rows_each: int = 1,
) -> list[list[float]]:
    """Each answer token's log-probability in the state in which it was revealed, one list a trajectory, in nats.

    decoding: how the tokens were drawn (default: temperature 1, nothing truncated; 0 counts as 1).
    row_tokens: length of a packed row. rows_each: rows of a forward; neither changes a number beyond rounding.
    """
    model = LogprobModel(lm.model, lm.unsampled_ids, decoding).to(lm.device)
    logprobs_of: list[list[float]] = [[0.0] * len(trajectory.token_ids) for trajectory in trajectories]
    if not trajectories:
        return logprobs_of

    strips = [trajectory_strip(trajectory, lm.block_size, lm.mask_token_id) for trajectory in trajectories]
    for rows in pack(strips, row_tokens, lm.block_size, lm.pad_token_id).split(rows_each):
        logprobs, *_ = model(rows.to(lm.device))
        # Packing mixes trajectories: a scored token tells by strip and position whose it is, and which.
        strip_indices = rows.at_targets(rows.strip).tolist()
        positions = rows.at_targets(rows.position).tolist()
        for i, position, logprob in zip(strip_indices, positions, logprobs.tolist(), strict=True):
            prompt_length = len(trajectories[i].prompt_ids)
            logprobs_of[i][position - prompt_length] = logprob
    return logprobs_of
