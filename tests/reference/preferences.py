"""The specification, as code, of preference optimisation: the formula as the papers write it, one forward a state.

DPO (arXiv 2305.18290) with a link function in place of -log σ for SLiC's hinge (arXiv 2309.06657) and IPO (arXiv
2310.12036), on log-probs as sums over denoising steps, or on evidence bounds under the same masks (VRPO, 2505.19223).
"""

from collections.abc import Sequence
from math import log

import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Trajectory
from tests.reference.objectives import States, state_logprobs, up_to_stop_token


def log_one_plus_exp(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros(()))


LOSS_OF_MARGIN = {
    "sigmoid": lambda margin, beta: log_one_plus_exp(-margin),
    "hinge": lambda margin, beta: torch.maximum(1 - margin, torch.zeros(())),
    "ipo": lambda margin, beta: (margin / beta - 1 / (2 * beta)) ** 2,
}


def answer_logprobs(
    lm: DiffusionLM, reference: DiffusionLM, answer: Trajectory, states: States, train_tail: bool, generator: Generator
) -> tuple[Tensor, float]:
    """log p of an answer by the policy, and by the reference in the same states."""
    length = len(answer.token_ids) if train_tail else up_to_stop_token(answer)
    policy, frozen = torch.zeros(()), 0.0
    for state, scored, _ in states(answer, BlockSpec(lm.block_size, lm.mask_token_id), generator):
        logprobs = state_logprobs(lm, state)
        with torch.no_grad():
            ref_logprobs = state_logprobs(reference, state)
        for k, weight in scored.items():
            if k < length:
                position, token = len(answer.prompt_ids) + k, answer.token_ids[k]
                policy = policy + weight * logprobs[position, token]
                frozen += weight * ref_logprobs[position, token].item()
    return policy, frozen


def preference_loss(
    lm: DiffusionLM,
    reference: DiffusionLM,
    pairs: Sequence[tuple[Trajectory, Trajectory]],
    states: States,
    link: str,
    beta: float,
    generator: Generator,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
    sft_weight: float = 0.0,
    train_tail: bool = True,
) -> Tensor:
    """The mean loss of pairs of a chosen and a rejected answer: ()."""
    total = torch.zeros(())
    # Each answer draws from a generator of its own.
    seeds = iter(torch.randint(2**62, (2 * len(pairs),), generator=generator).tolist())
    for pair in pairs:
        rewards = []
        lengths = []
        logprobs = []
        for answer in pair:
            draws = Generator().manual_seed(next(seeds))
            policy, frozen = answer_logprobs(lm, reference, answer, states, train_tail, draws)
            length = len(answer.token_ids) if train_tail else up_to_stop_token(answer)
            rewards.append(beta * (policy - frozen) / (length if length_normalised else 1))
            lengths.append(length)
            logprobs.append(policy)
        margin = rewards[0] - rewards[1]
        right = LOSS_OF_MARGIN[link](margin, beta)
        wrong = LOSS_OF_MARGIN[link](-margin, beta)
        total = total + (1 - label_smoothing) * right + label_smoothing * wrong
        total = total - sft_weight * logprobs[0] / lengths[0]
    return total / len(pairs)


LOSS_WITHOUT_PREFERENCE = {"sigmoid": log(2), "hinge": 1.0}  # of a policy that is the reference
