"""The loss of a pair of answers, by how much more than the reference the policy prefers the chosen one.

With log p of an answer as the views of the run take it (the sum over its denoising steps, or the evidence bound),

    margin = β [ (log π - log π_ref)(chosen) - (log π - log π_ref)(rejected) ]
    loss   = (1 - ε) link(margin) + ε link(-margin) + c · (-log π(chosen) / its tokens)

Policy and reference are scored on the same rows, so that where masks are drawn both see the same ones.

Shapes: N scored tokens of P pairs; (P, 2) holds what is the chosen answer's, then the rejected one's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dirl_cli.diffusion.layout import Rows
from dirl_cli.training.trainer import Sums

Link = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Preference:
    """A preference objective.

    link: a name in LINKS. beta: β, what a nat of log-ratio is worth. label_smoothing: ε, the chance that a pair is the
    wrong way round (conservative DPO). length_normalised: whether an answer's log-ratio is divided by its trained
    tokens. sft_weight: c.
    """

    link: str
    beta: float
    label_smoothing: float
    length_normalised: bool
    sft_weight: float

    def loss(self, rows: Rows, logprobs: Tensor, *_: Tensor) -> Sums:
        """Sums over the pairs of `rows`, each of them whole: the loss, and what is worth watching.

        rows.extras: `sample`, 2 p for the chosen answer of pair p and 2 p + 1 for the rejected one; `length`, its
        answer's trained tokens; and `ref_logprobs`.
        """
        slot = answer_slots(rows)
        logprob = sums_of_answers(rows.weight * logprobs, slot)  # (P, 2)
        ref_logprob = sums_of_answers(rows.weight * rows.extras["ref_logprobs"], slot)
        length = torch.ones_like(ref_logprob).flatten().scatter(0, slot, rows.extras["length"]).view(-1, 2)

        reward = self.beta * (logprob - ref_logprob)  # the implicit one, whose optimal policy this would be
        if self.length_normalised:
            reward = reward / length
        margin = reward[:, 0] - reward[:, 1]  # (P,)
        link = LINKS[self.link]
        smoothing = self.label_smoothing
        loss = (1 - smoothing) * link(margin, self.beta) + smoothing * link(-margin, self.beta)

        watched = {
            "reward_margin": margin,
            "reward_accuracy": (margin > 0).float(),
            "chosen_reward": reward[:, 0],
            "rejected_reward": reward[:, 1],
            "chosen_logprob": logprob[:, 0],
            "rejected_logprob": logprob[:, 1],
        }
        if self.sft_weight:
            sft_loss = -logprob[:, 0] / length[:, 0]
            watched |= {"preference_loss": loss, "sft_loss": sft_loss}
            loss = loss + self.sft_weight * sft_loss
        return {"loss": loss.sum()} | {name: value.detach().sum() for name, value in watched.items()}


def answer_slots(rows: Rows) -> Tensor:
    """Where each scored token's answer stands among those of `rows`, (N,): pairs in order, of each the chosen first."""
    sample = rows.extras["sample"]
    pair = (sample // 2).unique(return_inverse=True)[1]
    return 2 * pair + sample % 2


def sums_of_answers(values: Tensor, slot: Tensor) -> Tensor:
    """The sum of the values of each answer: (P, 2) from (N,)."""
    answers = int(slot.max()) // 2 * 2 + 2
    return values.new_zeros(answers).index_add(0, slot, values).view(-1, 2)


def sigmoid(margin: Tensor, beta: float) -> Tensor:
    """-log σ(margin): the pair is as likely as in Bradley and Terry's model (DPO, arXiv 2305.18290)."""
    return -logsigmoid(margin)


def hinge(margin: Tensor, beta: float) -> Tensor:
    """max(0, 1 - margin): nothing is learned from a pair once its margin is 1 (SLiC, arXiv 2309.06657)."""
    return (1 - margin).relu()


def ipo(margin: Tensor, beta: float) -> Tensor:
    """(margin/β - 1/2β)²: the log-ratios are to differ by 1/2β and no more (IPO, arXiv 2310.12036)."""
    return ((margin - 0.5) / beta).square()


LINKS: dict[str, Link] = {f.__name__: f for f in (sigmoid, hinge, ipo)}
