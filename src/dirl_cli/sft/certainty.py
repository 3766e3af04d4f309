"""Certainty in fine-tuning: what is predicted right already is to be surer, so that more of it can be revealed at once.

    loss = cross-entropy + β 1/M Σ_i 1{argmax p_i = x_i} H(softmax(logits_i / τ)),   i over a step's M hidden tokens

dParallel (arXiv 2509.26488, `LLaDA/llada_train.py`: τ 0.5, β 2) and LLaDA2's confidence-aware training (dFactory,
`tasks/train_llada2_bd.py`: τ 1, β 2 advised). As in both, a token's masking rate does not weigh its entropy, and the
gradient flows through all of the entropy and through no choice of which tokens are right.

Both divide by the right tokens of a micro-batch, whose number depends on how rows are cut. M is known before the first
forward; it makes their β this one times the share that is right.
"""

from functools import partial

from torch import Tensor

from dirl_cli.diffusion.layout import Rows
from dirl_cli.sft.validation import cross_entropy
from dirl_cli.training.trainer import Loss, Sums


def finetuning_loss(certainty: float, answer_tokens: int, hidden: int) -> Loss:
    """The loss of a step on so many answer tokens, which it is divided by, so many of them `hidden`.

    certainty: β; 0 leaves the cross-entropy as it is.
    """
    if not certainty:
        return cross_entropy
    return partial(certain_cross_entropy, certainty=certainty, each=answer_tokens / hidden)


def certain_cross_entropy(
    rows: Rows, logprobs: Tensor, entropy: Tensor, is_likeliest: Tensor, certainty: float, each: float
) -> Sums:
    """Sums over the scored tokens (N,): the loss, its two parts, and the hidden tokens that are right.

    each: what a hidden token counts in all but the cross-entropy. A causal model's rows hide nothing, and have no view
    but the clean one.
    """
    is_right = is_likeliest & (rows.at_targets(rows.view) > 0)
    right_entropy = each * (entropy * is_right).sum()
    loss = cross_entropy(rows, logprobs)["loss"]
    return {
        "loss": loss + certainty * right_entropy,
        "cross_entropy": loss.detach(),
        "certainty_loss": right_entropy.detach(),
        "right": each * is_right.sum(),
    }
