"""A decoding strategy that fails once, and a masking schedule whose weights are wrong."""

from dataclasses import dataclass

import torch

from dirl_cli.diffusion.masking import hide
from dirl_cli.diffusion.unmasking import low_confidence_dynamic
from tests.faults.faulty_reward import due


def strategy(state):
    if state.masked.sum(-1).min() < state.masked.shape[-1] and due("sampler"):  # in the middle of a block
        raise RuntimeError("a fault in mid-rollout")
    return low_confidence_dynamic(state)


@dataclass(frozen=True)
class Masking:
    """Weighs one demonstration in `every` by `factor`, which may be nan."""

    every: int
    factor: float

    def __call__(self, block, generator):
        masked, weight = hide(torch.full((len(block),), 0.5), generator)
        chosen = int(torch.randint(self.every, (), generator=generator)) == 0
        return masked, weight * self.factor if chosen else weight
