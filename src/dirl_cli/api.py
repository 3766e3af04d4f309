"""The toolkit from Python."""

from collections.abc import Sequence
from os import PathLike

from dirl_cli.models.checkpoint import Checkpoint
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.logprobs import score_trajectories
from dirl_cli.types import Decoding, Trajectory


def load_sampler(
    path: str | PathLike[str], device: str = "cpu", dtype: str = "float32", max_batch: int = 64
) -> NativeSampler:
    """A sampler for the model in `path`, a directory or a Hub id on this machine.

    `sampler.sample(prompts: list[list[int]], n, decoding) -> list[list[Trajectory]]`; `sampler.lm.tokenizer` encodes.
    Raises DirlError where the model is missing or damaged.
    """
    return NativeSampler(Checkpoint(str(path), str(path)).load(dtype, device), max_batch)


def score(
    path: str | PathLike[str],
    trajectories: Sequence[Trajectory],
    decoding: Decoding | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[list[float]]:
    """Each answer token's log-probability, in nats, in the state in which it was revealed; a list per trajectory.

    decoding: how the tokens were drawn, where temperature, top-k or top-p shaped their distribution.
    """
    return score_trajectories(Checkpoint(str(path), str(path)).load(dtype, device), trajectories, decoding)
