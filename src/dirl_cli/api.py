"""The toolkit from Python."""

from collections.abc import Sequence
from os import PathLike

from dirl_cli.cli.build import build_choice, build_settings
from dirl_cli.cli.run_dir import PATH_MODEL, model_of_run
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.engines import Engine
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.training.logprobs import trajectory_logprobs
from dirl_cli.types import Decoding, Trajectory


def load_sampler(
    path: str | PathLike[str],
    device: str = "auto",
    dtype: str = "auto",
    max_batch: int | None = None,
    rollout: str | Engine = "native",
    cache_share: float | None = None,
) -> Sampler:
    """A sampler for the model in `path`: a directory, a run or one of its checkpoints, or a Hub id on this machine.

    `sampler.sample(prompts: list[list[int]], n, decoding) -> list[list[Trajectory]]`; `sampler.lm.tokenizer` encodes.
    rollout: `native`, `lmdeploy` (at most `max_batch` answers at once; cache_share is LMDeploy's), or an engine. What
    is left out of these is as conf/rollout says.
    device, dtype: auto is cuda and bfloat16 where there is a GPU, else cpu and float32.
    Raises DirlError where the model is missing or damaged, and where the engine cannot run here.
    """
    given = {"max_batch": max_batch, "cache_share": cache_share}
    chosen = {key: value for key, value in given.items() if value is not None}
    engine: Engine = build_choice("rollout", rollout, **chosen) if isinstance(rollout, str) else rollout
    engine.require()
    return engine.start(load(path, dtype, device))


def score(
    path: str | PathLike[str],
    trajectories: Sequence[Trajectory],
    decoding: Decoding | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[list[float]]:
    """Each answer token's log-probability, in nats, in the state in which it was revealed; a list per trajectory.

    path: as of `load_sampler`. decoding: how the tokens were drawn, where temperature, top-k or top-p shaped their
    distribution.
    """
    return trajectory_logprobs(load(path, dtype, device), trajectories, decoding)


def load(path: str | PathLike[str], dtype: str, device: str) -> DiffusionLM:
    """The model that `model=PATH` is on the command line."""
    given = {"_target_": PATH_MODEL, "name": str(path), "path": str(path)}
    lm: DiffusionLM = build_settings("model", model_of_run(given)).load(dtype, device)
    return lm
