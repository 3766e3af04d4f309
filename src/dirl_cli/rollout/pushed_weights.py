"""Weights that a trainer hands to servers: a directory on a disk that all of them see, and what it is known by.

weights/version-000012/
    model.safetensors   all parameters by their published names
    config.json         so that it is a model directory
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dirl_cli.files import atomic_directory, remove
from dirl_cli.models.safe_files import WEIGHTS
from dirl_cli.models.save import published_weights


@dataclass(frozen=True)
class WeightsId:
    """What weights are known by: no two runs, and no two versions of one, have the same.

    version: optimizer steps that they had taken. sha256: of their file, in hexadecimal digits; None for those that a
    server was started with.
    """

    version: int
    sha256: str | None = None


def write_weights(
    directory: Path, model: PreTrainedModel, named_tensors: Iterable[tuple[str, Tensor]], version: int
) -> tuple[Path, WeightsId]:
    """Write weights into a directory of their own, whole or not at all: where they are, and what they are known by.

    named_tensors: by the names that `model` has for them. Raises DirlError where they cannot be written.
    """
    tensors = {}  # all of them before anything can fail, since other processes may help to gather them
    for name, tensor in published_weights(model, named_tensors):
        tensors[name] = tensor.cpu().contiguous()

    path = (directory / f"version-{version:06d}").absolute()
    with atomic_directory(path) as partial:
        save_file(tensors, partial / WEIGHTS, {"format": "pt"})
        (partial / WEIGHTS).chmod(0o644)  # safetensors makes it readable for its owner only
        model.config.save_pretrained(partial)
        sha256 = sha256_of(partial / WEIGHTS)
    return path, WeightsId(version, sha256)


def remove_other_weights(directory: Path, kept: Path) -> None:
    """Delete the versions in a directory, but for one."""
    for path in directory.glob("version-*"):
        if path.absolute() != kept:
            remove(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
