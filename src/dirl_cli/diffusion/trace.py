"""The states a trajectory went through, as a strip that scores each token in the state that revealed it."""

import torch

from dirl_cli.diffusion.layout import Strip, lay_out
from dirl_cli.errors import DirlError
from dirl_cli.types import Trajectory


def trajectory_strip(trajectory: Trajectory, block_size: int, mask_id: int) -> Strip:
    """One view per denoising step: what step s revealed is scored where all of step ≥ s is masked.

    Raises DirlError where the answer is not whole blocks of this size, since any other was never a state of the
    sampler's.
    """
    if trajectory.block_size not in (None, block_size):
        raise DirlError(
            f"an answer was sampled in blocks of {trajectory.block_size} and the model's are of {block_size}:"
            " set model.block_size as it was"
        )
    token_ids = torch.tensor([*trajectory.prompt_ids, *trajectory.token_ids])
    if len(token_ids) % block_size:
        raise DirlError(
            f"a trajectory of {len(token_ids)} tokens is not whole blocks of {block_size}: keep its last block whole"
        )
    reveal_step = torch.tensor([*[0] * len(trajectory.prompt_ids), *trajectory.reveal_step])
    step = torch.arange(1, int(reveal_step.max()) + 1)[:, None]
    scored = reveal_step == step  # (steps, L)
    return lay_out(token_ids, reveal_step >= step, scored, torch.ones(scored.shape), block_size, mask_id)
