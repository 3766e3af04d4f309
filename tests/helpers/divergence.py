"""Where two engines' greedy answers to a prompt part, and by how little the decision was made.

In low precision, rounding tips decisions whose margin is small, and from there on all differs. So answers of a GPU are
not compared token by token, but up to the first decision that differs, which must have been a close one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dirl_cli.diffusion.sampling import temper
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Decoding, Trajectory
from tests.reference.sampling import last_block_logits


@dataclass(frozen=True)
class Divergence:
    """after: how many answer tokens they share. decision: what differed. margin: of the decision, in nats."""

    after: int
    decision: str
    margin: float


def first_divergence(lm: DiffusionLM, one: Trajectory, other: Trajectory, decoding: Decoding) -> Divergence | None:
    """The first decision in which two greedy answers to a prompt differ, None if none.

    Its margin is, by the slow loop's logits, how much more likely one token is than the other, or how much more
    confident the model is at one position than at the other, or than the threshold.
    """
    prompt, size = one.prompt_ids, lm.block_size
    begin = 0
    while begin < len(one.token_ids):
        end = begin + size - (len(prompt) + begin) % size
        for step in range(1, size + 1):
            revealed, other_revealed = revealed_by(one, begin, end, step), revealed_by(other, begin, end, step)
            if revealed != other_revealed:
                block = list(one.token_ids[begin:end])
                for i, revealed_at in enumerate(one.reveal_step[begin:end]):
                    if revealed_at >= step:
                        block[i] = lm.mask_token_id
                logits = last_block_logits(lm, prompt + one.token_ids[:begin] + block)[begin - end :]
                full = temper(logits, 0.0, torch.tensor(lm.unsampled_ids, device=lm.device)).log_softmax(-1)
                return Divergence(begin, *difference(full, revealed, other_revealed, decoding))
        begin = end
    return None


def revealed_by(answer: Trajectory, begin: int, end: int, step: int) -> dict[int, int]:
    """Tokens by their position in a stretch of an answer, of those that a step revealed."""
    return {i - begin: answer.token_ids[i] for i in range(begin, end) if answer.reveal_step[i] == step}


def difference(
    logprobs: Tensor, revealed: dict[int, int], other_revealed: dict[int, int], decoding: Decoding
) -> tuple[str, float]:
    """What was decided, and by what margin. logprobs: (positions, V)."""
    for position in revealed.keys() & other_revealed.keys():
        token, other_token = revealed[position], other_revealed[position]
        if token != other_token:
            margin = logprobs[position, token] - logprobs[position, other_token]
            return f"token {token} or {other_token}", abs(margin.item())

    confidence = logprobs.amax(-1)
    alone = [confidence[position].item() for position in revealed.keys() - other_revealed.keys()]
    other_alone = [confidence[position].item() for position in other_revealed.keys() - revealed.keys()]
    if decoding.strategy == "sequential":
        return "places, though their order is given", float("inf")
    if alone and other_alone:
        return "places", min(abs(a - b) for a in alone for b in other_alone)
    threshold = torch.tensor(decoding.threshold).log().item()
    return "how many", min(abs(a - threshold) for a in alone + other_alone)
