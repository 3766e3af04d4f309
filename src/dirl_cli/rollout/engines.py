"""Engines by their settings: what `rollout=` chooses among. Each starts on a loaded model."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp

import torch

from dirl_cli import hub
from dirl_cli.errors import DirlError
from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.sampler import Sampler

LMDEPLOY = "0.18"


@dataclass(frozen=True)
class Native:
    """This toolkit's own, on any device. max_batch: sequences at once."""

    max_batch: int

    def start(self, lm: DiffusionLM) -> Sampler:
        return NativeSampler(lm, self.max_batch)


@dataclass(frozen=True)
class Lmdeploy:
    """LMDeploy's PyTorch engine, on a GPU. cache_share: of the memory left beside the weights, for keys and values."""

    max_batch: int
    cache_share: float

    def start(self, lm: DiffusionLM) -> Sampler:
        """The engine with the weights of `lm`. Raises DirlError where the package or a CUDA device is missing."""
        try:
            found = version("lmdeploy")
        except PackageNotFoundError as error:
            raise DirlError(
                "rollout=lmdeploy wants LMDeploy: pip install 'dirl[lmdeploy]' in an environment with torch 2.12 or"
                " older, or leave rollout at native"
            ) from error
        if not found.startswith(f"{LMDEPLOY}."):
            raise DirlError(
                f"rollout=lmdeploy wants LMDeploy {LMDEPLOY}, not {found}: pip install lmdeploy=={LMDEPLOY}.0"
            )
        if not torch.cuda.is_available():
            raise DirlError("rollout=lmdeploy wants a CUDA device and there is none: leave rollout at native")
        from dirl_cli.rollout.lmdeploy import LmdeploySampler, start_engine

        sampler = LmdeploySampler(lm, start_engine(lm, on_disk(lm), self.max_batch, self.cache_share))
        sampler.update_weights(lm.model.named_parameters(), 0)
        return sampler


def on_disk(lm: DiffusionLM) -> str:
    """The directory of a checkpoint that is like `lm` but for its weights."""
    source = lm.model.name_or_path
    if source:
        return source if Path(source).is_dir() else str(hub.local(source, "model"))
    directory = Path(mkdtemp()) / "model"
    lm.save(directory)
    return str(directory)
