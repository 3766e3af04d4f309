"""One recorded reveal trace, for every engine alike: a decoding strategy that does what the trace did."""

from functools import cache

import torch
from torch import Tensor

from dirl_cli.diffusion.unmasking import State

PATTERNS = [[1, 1, 2, 3], [2, 1, 1, 1], [1, 2, 2, 1], [2, 1, 1, 2], [1, 2, 3, 1]]  # 12 steps for 5 blocks, as DiPO's
MEAN_STEPS = sum(map(max, PATTERNS)) / len(PATTERNS)


def replayed(state: State) -> Tensor:
    """What the recorded step revealed of each block, (N, B): of all that is still masked, what came first."""
    steps = recorded(state.start // state.masked.shape[1])
    first = steps.masked_fill(~state.masked, len(steps[0]) + 1).amin(1, keepdim=True)
    return state.masked & (steps == first)


def recorded(blocks: Tensor) -> Tensor:
    """The steps at which the tokens of these blocks were revealed, by number. (N,) to (N, B)."""
    return on(blocks.device)[blocks % len(PATTERNS)]


@cache
def on(device: torch.device) -> Tensor:
    """The patterns on a device, moved there once."""
    return torch.tensor(PATTERNS, device=device)
