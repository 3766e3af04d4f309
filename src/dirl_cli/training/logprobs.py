"""Log-probabilities of the scored tokens of packed rows, without ever holding all logits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dirl_cli.diffusion.layout import Rows, pack
from dirl_cli.diffusion.sampling import entropy, temper, truncate
from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.models.attention import hidden_states
from dirl_cli.models.load import DiffusionLM, is_shifted
from dirl_cli.training.head import Scores, linear_logprobs, tokens_at_once
from dirl_cli.types import Decoding, Trajectory


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
def score_trajectories(
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
