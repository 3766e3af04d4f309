"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

What is random depends on the seed and the step alone, so that parameters, optimizer states and the step are all
there is to keep, and what a command wants to remember besides. The files do not depend on the number of processes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dirl_cli.disk import remove, whole_directory
from dirl_cli.errors import DirlError
from dirl_cli.models.checkpoint import DiffusionLM, pick_dtype

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


@dataclass(frozen=True)
class Checkpoints:
    """The last `keep` checkpoints in `directory`, one directory per step. Every process calls; one writes."""

    directory: Path
    keep: int
    accelerator: Accelerator

    def save(self, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], **remembered: Any) -> Path:
        """Write a checkpoint, whole or not at all, then drop the oldest beyond `keep`. remembered: plain values."""
        model_state = named_tensors(model, get_model_state_dict(model, options=GATHERED))
        optimizer_state = get_optimizer_state_dict(model, optimizers, options=GATHERED)
        path = self.directory / f"step-{step:06d}"
        if self.accelerator.is_main_process:
            with whole_directory(path) as partial:
                save_file(contiguous(model_state), partial / MODEL)
                save_file(contiguous(flat(optimizer_state["state"])), partial / OPTIMIZER)
                (partial / STATE).write_text(json.dumps({"step": step, **remembered}) + "\n")
            for old in complete(self.directory)[: -self.keep]:
                remove(old)
        self.accelerator.wait_for_everyone()
        return path

    def latest(self) -> Path | None:
        return next(reversed(complete(self.directory)), None)


def load(path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Put a checkpoint into the model and its optimizers; returns `step` and what else was remembered.

    Raises DirlError where it is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        assert isinstance(state["step"], int)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DirlError(f"{path} is not a checkpoint: give resume= a directory that holds {STATE}") from error
    model_state: dict[str, Any] = read(path / MODEL, named_tensors(model, get_model_state_dict(model)))
    present: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizers))
    optimizer_state = read(path / OPTIMIZER, flat(present["state"]))
    # rates and betas are the configuration's, states the checkpoint's
    present["state"] = nested(optimizer_state)
    set_optimizer_state_dict(model, optimizers, present, options=GATHERED)
    set_model_state_dict(model, model_state, options=GATHERED)
    return state


def find(resume: str) -> Path | None:
    """The checkpoint that `resume` names: itself or its run's directory; none for auto and never."""
    if resume in ("auto", "never"):
        return None
    path = Path(resume).expanduser()
    found = [path] if (path / STATE).exists() else complete(path / "checkpoints")
    if not found:
        raise DirlError(f"{path} holds no checkpoint: give resume= a directory that holds {STATE}, or that of a run")
    return found[-1]


def save_model(lm: DiffusionLM, dtype: str, directory: Path, card: str, accelerator: Accelerator) -> None:
    """Write the trained model in the published layout, its weights as `dtype`, which they keep from now on."""
    nn.Module.to(lm.model, dtype=pick_dtype(dtype, str(lm.device)))
    state: Any = get_model_state_dict(lm.model, options=GATHERED)
    if accelerator.is_main_process:
        lm.save(directory, card, state)
    accelerator.wait_for_everyone()


def complete(directory: Path) -> list[Path]:
    """The checkpoints in `directory` by step; what a crash left half-written has another name."""
    return sorted((path.parent for path in directory.glob(f"step-*/{STATE}")), key=lambda path: int(path.name[5:]))


def named_tensors(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters and buffers of a state dictionary, tied ones once."""
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: value for name, value in state.items() if name in own}


def flat(states: Any) -> dict[str, Tensor]:
    """The optimizers' states by parameter, such as `layers.0.weight.exp_avg`."""
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, key = full_name.rsplit(".", 1)
        states.setdefault(name, {})[key] = value
    return states


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}


def read(file: Path, wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors of `file`, which must be those `wanted` by name and shape."""
    remedy = f"remove {file.parent} to go on from the checkpoint before it"
    try:
        tensors = load_file(file)
    except FileNotFoundError as error:
        raise DirlError(f"{file} is missing: {remedy}") from error
    except (OSError, SafetensorError) as error:
        raise DirlError(f"{file} is damaged ({error}): {remedy}") from error
    for name, value in wanted.items():
        if name not in tensors:
            raise DirlError(f"{file} lacks the tensor {name}: {remedy}")
        if tensors[name].shape != value.shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(value.shape)} as in this model"
            raise DirlError(f"{file} holds {name} with shape {shapes}: {remedy}")
    return tensors
