"""The specification, as code, of a DiPO batch in its published form: an answer is `block_size` rows of doubled length.

Row s shows, side by side, the sequence with every token of step ≥ s masked and the sequence itself. Rows for steps
that did not happen are there too, and every row is as long as the longest allowed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Trajectory


@dataclass(frozen=True)
class Expanded:
    """R = answers × block_size rows of 2L tokens.

    token_ids: (R, 2L), noised half first. targets: (R, L). scored: (R, L) bool, what step s of the row revealed.
    sample: (R,) the answer that a row belongs to.
    """

    token_ids: Tensor
    targets: Tensor
    scored: Tensor
    sample: Tensor

    def rows(self, chosen: slice) -> "Expanded":
        return Expanded(self.token_ids[chosen], self.targets[chosen], self.scored[chosen], self.sample[chosen])


def expand(trajectories: Sequence[Trajectory], length: int, block_size: int, mask_id: int, pad_id: int) -> Expanded:
    """length: L, tokens of prompt and answer to which every sequence is padded."""
    rows, targets, scored, sample = [], [], [], []
    for i, answer in enumerate(trajectories):
        padding = length - len(answer.prompt_ids) - len(answer.token_ids)
        clean = torch.tensor([*answer.prompt_ids, *answer.token_ids, *[pad_id] * padding])
        reveal_step = torch.tensor([*[0] * len(answer.prompt_ids), *answer.reveal_step, *[0] * padding])
        for step in range(1, block_size + 1):
            noised = torch.where(reveal_step >= step, mask_id, clean)
            rows.append(torch.cat([noised, clean]))
            targets.append(clean)
            scored.append(reveal_step == step)
            sample.append(i)
    return Expanded(torch.stack(rows), torch.stack(targets), torch.stack(scored), torch.tensor(sample))


def doubled_mask(length: int, block_size: int) -> Tensor:
    """(2L, 2L) bool as published for block diffusion (arXiv 2503.09573): noised tokens see their block and earlier
    clean ones, clean tokens see clean blocks up to their own."""
    index = torch.arange(2 * length)
    noised, block = index < length, index % length // block_size
    q, k = block[:, None], block[None, :]
    block_diagonal = noised[:, None] & noised & (q == k)
    offset_block_causal = noised[:, None] & ~noised & (k < q)
    block_causal = ~noised[:, None] & ~noised & (k <= q)
    return block_diagonal | offset_block_causal | block_causal


def expanded_logprobs(lm: DiffusionLM, rows: Expanded, all_logits: bool = True) -> Tensor:
    """Log-probabilities of the targets in the noised half, zero where not scored: (R, L).

    all_logits: as published, of every position of the noised half; else of the scored ones alone.
    """
    length = rows.targets.shape[1]
    hidden = lm.model.get_decoder()(
        input_ids=rows.token_ids,
        position_ids=torch.arange(length).repeat(2)[None].expand_as(rows.token_ids),
        attention_mask=doubled_mask(length, lm.block_size).expand(len(rows.token_ids), 1, -1, -1),
        use_cache=False,
    ).last_hidden_state[:, :length]
    computed = torch.ones_like(rows.scored) if all_logits else rows.scored
    logits = lm.model.get_output_embeddings()(hidden[computed]).float()
    logits = logits.index_fill(-1, torch.tensor(lm.unsampled_ids), -torch.inf)
    logprobs = logits.log_softmax(-1).gather(-1, rows.targets[computed][:, None]).squeeze(-1)
    return torch.zeros(computed.shape).masked_scatter(computed, logprobs).where(rows.scored, 0)


def dipo_sum(
    logprobs: Tensor, old: Tensor, advantage: Tensor, scored: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """-Σ min(rA, clip(r, 1 - ε_low, 1 + ε_high) A) over the scored positions. All (R, L), advantage (R,)."""
    ratio = (logprobs - old).exp()
    worth = advantage[:, None]
    term = torch.minimum(ratio * worth, ratio.clamp(1 - clip_low, 1 + clip_high) * worth)
    return -(term * scored).sum()
