"""Weights of a directory for a model that is loaded already: checked against its names and shapes, then read."""

from copy import deepcopy
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM, require_finite
from dirl_cli.models.model_directory import ModelDirectory
from dirl_cli.models.safe_files import INDEX, WEIGHTS, read_object
from dirl_cli.models.save import published_weights
from dirl_cli.rollout.pushed_weights import sha256_of
from dirl_cli.text import counted

Shapes = dict[str, tuple[int, ...]]


class WrongWeights(DirlError):  # noqa: N818
    """Weights that cannot replace those of a model, which is the fault of whoever gave them."""


def published_shapes(lm: DiffusionLM) -> Shapes:
    """The shape of each tensor of a model, by its name in a file."""
    return {name: tuple(tensor.shape) for name, tensor in published_weights(lm.model, lm.model.named_parameters())}


def require_weights(path: str, shapes: Shapes, sha256: str | None = None) -> None:
    """Raises DirlError where the weights in a directory are not those of a model.

    It reads their headers alone; where `sha256` is given, all of the one file that they are to be in.
    """
    directory = ModelDirectory(path).directory()
    require_shapes(path, stored_shapes(directory), shapes)
    if sha256 is None:
        return
    try:
        stored_sha256 = sha256_of(directory / WEIGHTS)
    except OSError as error:
        raise DirlError(f"{directory / WEIGHTS} cannot be read ({error.strerror}): give one file of weights") from error
    if stored_sha256 != sha256:
        raise DirlError(f"{directory / WEIGHTS} is not what its SHA-256 says: write or copy it again")


def require_shapes(path: str, stored: Shapes, shapes: Shapes) -> None:
    """Raises DirlError where tensors that are stored in `path` are not those of a model."""
    missing = sorted(shapes.keys() - stored.keys())
    if missing:
        raise DirlError(
            f"{path} lacks {counted(len(missing), 'tensor')} of the model that is served, such as {missing[0]}:"
            " give weights of the same model"
        )
    for name, shape in shapes.items():
        if stored[name] != shape:
            raise DirlError(
                f"{path} holds {name} with shape {stored[name]}, and the model that is served has {shape}:"
                " give weights of the same model"
            )


def stored_shapes(directory: Path) -> Shapes:
    """The shape of each tensor in the weight files of a model directory. Raises DirlError where there is none."""
    files = {WEIGHTS}
    if not (directory / WEIGHTS).exists():
        index = read_object(directory / INDEX).get("weight_map")
        files = set(index.values()) if isinstance(index, dict) else set()
    if not files:
        raise DirlError(f"{directory} holds no {WEIGHTS}: give a directory as `dirl sft` leaves it")

    shapes: Shapes = {}
    for name in sorted(files):
        try:
            with safe_open(directory / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118  # it is no mapping
                    shapes[key] = tuple(file.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise DirlError(f"{directory / name} cannot be read ({error}): download or copy it again") from error
    return shapes


def read_weights(path: str, lm: DiffusionLM) -> dict[str, Tensor]:
    """The weights in a directory by the names of the model that is served, on the CPU.

    Raises WrongWeights where they are damaged, incomplete, of another shape, or not finite.
    """
    stored = ModelDirectory(path)
    config = deepcopy(lm.model.config)
    try:
        model = stored.model(stored.directory(), config, lm.model.dtype)
        require_finite(model)
    except DirlError as error:
        raise WrongWeights(str(error)) from error
    return dict(model.named_parameters())
