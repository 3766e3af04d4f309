"""The toolkit from Python: `from dirl_cli import load_sampler, score`.

It is a file of its own, and not the package's first, so that `import dirl_cli` and `dirl --help` import no torch.
"""

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
    """Load the model in `path` into a sampler. path: a directory, a run or one of its checkpoints, or a downloaded id.

    `sampler.sample(prompts: list[list[int]], n, decoding) -> list[list[Trajectory]]`; `sampler.lm.tokenizer` encodes.
    rollout: `native`, `lmdeploy` (at most `max_batch` answers at once, keys and values in a `cache_share` of a GPU's
    free memory), or an engine. What is left out of these is as conf/rollout says.
    device, dtype: auto is cuda and bfloat16 where there is a GPU, else cpu and float32.
    Raises DirlError where the model is missing or damaged, and where the engine cannot run here.
    """
    settings = {"max_batch": max_batch, "cache_share": cache_share}
    if isinstance(rollout, str):
        overrides = {key: value for key, value in settings.items() if value is not None}
        engine: Engine = build_choice("rollout", rollout, **overrides)
    else:
        engine = rollout
    engine.require()
    return engine.start(load(path, dtype, device))


def score(
    path: str | PathLike[str],
    trajectories: Sequence[Trajectory],
    decoding: Decoding | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[list[float]]:
    """Compute each answer token's log-probability, in nats, in the state it was revealed in; a list per trajectory.

    path, device, dtype: as those of `load_sampler`.
    decoding: how the tokens were drawn, where temperature, top-k or top-p shaped their distribution.
    """
    return trajectory_logprobs(load(path, dtype, device), trajectories, decoding)


def load(path: str | PathLike[str], dtype: str, device: str) -> DiffusionLM:
    """Load what `model=PATH` is on the command line."""
    settings = {"_target_": PATH_MODEL, "name": str(path), "path": str(path)}
    lm: DiffusionLM = build_settings("model", model_of_run(settings)).load(dtype, device)
    return lm
