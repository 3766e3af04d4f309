"""The specification, as code, of TraceRL's critic: one forward a state, and for each token sums over all that follows.

A step is what one state of the trace reveals. V*_s is the mean of its tokens' values, 0 behind the last step.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rl.critic import ValueModel
from dirl_cli.types import Trajectory
from tests.reference.objectives import as_sampled

Step = dict[int, Tensor]  # the value of each token of the answer that a step revealed, by its index


def values_of_steps(model: ValueModel, lm: DiffusionLM, answer: Trajectory, merged: int = 1) -> list[Step]:
    """The steps of an answer in their order, `merged` of a block counting as one."""
    steps = []
    for state, scored, _ in as_sampled(answer, BlockSpec(lm.block_size, lm.mask_token_id), Generator(), merged):
        block = torch.arange(len(state)) // lm.block_size
        seen = (block[:, None] >= block[None, :])[None, None]
        hidden = model.decoder(input_ids=torch.tensor([state]), attention_mask=seen).last_hidden_state[0]
        steps.append({k: hidden[len(answer.prompt_ids) + k] @ model.weight for k in scored})
    return steps


def worth_of_tokens(
    steps: Sequence[Step], rewards: Sequence[float], gamma: float, gae_lambda: float
) -> dict[int, tuple[float, float]]:
    """Advantage and return of each token, by its index. rewards: of each step."""
    value = [sum(one.item() for one in step.values()) / len(step) for step in steps] + [0.0]
    delta = [rewards[s] - value[s] + gamma * value[s + 1] for s in range(len(steps))]
    worth = {}
    for s, step in enumerate(steps):
        later = range(s + 1, len(steps))
        advantage_ahead = sum((gamma * gae_lambda) ** (k - s - 1) * delta[k] for k in later)
        return_ = sum(gamma ** (k - s) * rewards[k] for k in range(s, len(steps)))
        for index, own in step.items():
            ahead = gamma * value[s + 1] + gamma * gae_lambda * advantage_ahead
            worth[index] = (rewards[s] - own.item() + ahead, return_)
    return worth


def value_loss(new: Tensor, old: float, return_: float, clip: float) -> Tensor:
    """½ of the larger square: of the value's error, and of the error of what is within `clip` of the old value: ()."""
    near = new
    if new.item() > old + clip:
        near = torch.tensor(old + clip)
    elif new.item() < old - clip:
        near = torch.tensor(old - clip)
    error, near_error = (new - return_) ** 2, (near - return_) ** 2
    return 0.5 * (error if error.item() > near_error.item() else near_error)
