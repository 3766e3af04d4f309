"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

What is random depends on the seed and the step alone, so that parameters, optimizer states and the step are all
there is to keep, and what a command wants to remember besides. Where the model is sharded, every process writes what
it holds; any number of processes reads any checkpoint.

    checkpoints/step-000012/
        model.safetensors       trained parameters in fp32, or model-00001-of-00002.safetensors, … where sharded
        optimizer.safetensors   states by parameter, such as layers.0.weight.exp_avg; likewise
        reference.safetensors   of a reference model that moves, and whatever else a command keeps
        critic.safetensors      of what learns beside the model, with critic_optimizer.safetensors
        state.json              step, optimizers, measured metrics, and what the command remembers
        SHA256SUMS              of the files above, written last
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dirl_cli.errors import DirlError
from dirl_cli.models.peft import trainable_parameters
from dirl_cli.training.shards import read_shards, stored_shapes
from dirl_cli.types import STATE

MODEL = "model"
OPTIMIZER = "optimizer"
SUMS = "SHA256SUMS"  # written last; `sha256sum --check` reads it too
FORMER = {"beside": "base_fingerprint", "began_as": "base_fingerprint"}  # what keys of a state.json were once called
Optimizers = Sequence[torch.optim.Optimizer]
NamedTensors = Mapping[str, Mapping[str, Tensor]]  # by the name of their file and their own


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint remembers: `step`, `command`, `base_fingerprint` and what else its command wants to know.

    Checkpoints of earlier versions did not name their command: those of `dirl rl` count `updates`.
    """
    stored = json.loads((path / STATE).read_text())
    state = {FORMER.get(key, key): value for key, value in stored.items()}
    return {"command": "rl" if "updates" in state else "sft", **state}


def require_same_run(path: Path, command: str, base_fingerprint: str | None) -> None:
    """Refuse to go on from a checkpoint of the other command, or of a run that started from other weights.

    base_fingerprint: of the weights this run starts from, where it needs them besides those in the checkpoint, such as
    under an adapter or as a reference; else None.
    """
    state = read_state(path)
    if state["command"] != command:
        raise DirlError(
            f"{path} is a checkpoint of `dirl {state['command']}`, which `dirl {command}` cannot resume:"
            f" to start from its weights, give model={path}"
        )
    if base_fingerprint not in (None, state["base_fingerprint"]):
        raise DirlError(
            f"the base model's weights differ from those that the run of {path} started from:"
            " restore them, or start a new run with another name="
        )


def require_same_teacher(began_with: str | None, now: str | None) -> None:
    """Raises DirlError where an unfinished run would go on with another teacher. Both are fingerprints of weights."""
    if now != began_with:
        raise DirlError(
            "the weights in algo.teacher are not those that this run began with: put them back, give this run another"
            " name=, or begin anew with resume=never"
        )


def load_checkpoint(
    path: Path, model: nn.Module, optimizers: Optimizers, further: NamedTensors | None = None
) -> dict[str, Any]:
    """Put a good checkpoint into the model and its optimizers; returns `step` and what else was remembered.

    further: more tensors, by the name of their file; those of a file that the checkpoint has not stay as they are.
    Raises DirlError where it is one of another model or of other optimizers.
    """
    state = read_state(path)
    writers = " and ".join(state["optimizers"])
    readers = " and ".join(optimizer_names(optimizers))
    if writers != readers:
        raise DirlError(f"{path} was written by {writers}, not {readers}: give the optim= of its run")

    parameters = trainable_parameters(model)
    read_shards(checkpoint_files(path, MODEL), parameters)
    for name, kept in (further or {}).items():
        if checkpoint_files(path, name):
            read_shards(checkpoint_files(path, name), kept)

    read_optimizer_states(checkpoint_files(path, OPTIMIZER), parameters, optimizers)
    return state


def load_other(path: Path, name: str, model: nn.Module, optimizers: Optimizers) -> bool:
    """Put what learned beside the model into `model` and its optimizers; returns whether the checkpoint has it."""
    files = checkpoint_files(path, name)
    if files:
        parameters = trainable_parameters(model)
        read_shards(files, parameters)
        read_optimizer_states(checkpoint_files(path, f"{name}_{OPTIMIZER}"), parameters, optimizers)
    return bool(files)


def tensors_of(name: str, model: nn.Module, optimizers: Optimizers) -> NamedTensors:
    """What a checkpoint keeps of what learns beside the model, by the name of its file."""
    return {name: trainable_parameters(model), f"{name}_{OPTIMIZER}": optimizer_states(model, optimizers)}


def read_optimizer_states(
    files: Sequence[Path], parameters: Mapping[str, nn.Parameter], optimizers: Optimizers
) -> None:
    """Put the states in some files, by parameter and key, into the optimizers of these parameters."""
    # An optimizer without steps has no states yet: make empty ones, read into them, then hand them over.
    states = empty_states(stored_shapes(files), parameters)
    tensors = {}
    for name, values in states.items():
        for key, value in values.items():
            tensors[f"{name}.{key}"] = value
    read_shards(files, tensors)

    name_of = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        # Rates and betas are the configuration's, states the checkpoint's. A state dict numbers the parameters.
        groups = optimizer.state_dict()["param_groups"]
        by_number = {}
        for numbered, group in zip(groups, optimizer.param_groups, strict=True):
            for number, parameter in zip(numbered["params"], group["params"], strict=True):
                name = name_of[parameter]
                if name in states:
                    by_number[number] = states[name]
        optimizer.load_state_dict({"state": by_number, "param_groups": groups})


def empty_states(shapes: Mapping[str, torch.Size], parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors for optimizer states by parameter and key, sharded as their parameter where they have its shape.

    shapes: by parameter and key, such as `layers.0.weight.exp_avg`.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, shape in shapes.items():
        name, key = full_name.rsplit(".", 1)
        parameter = parameters[name].detach()
        if shape == parameter.shape:
            state = torch.empty_like(parameter)
        else:  # such as the count of steps, which every process has
            state = torch.empty(shape)
        states.setdefault(name, {})[key] = state
    return states


def checkpoint_files(path: Path, kind: str) -> list[Path]:
    """The safetensors files of a checkpoint. kind: MODEL, OPTIMIZER, or another that its command keeps."""
    return sorted([*path.glob(f"{kind}.safetensors"), *path.glob(f"{kind}-*.safetensors")])


def find_checkpoint(resume: str) -> Path | None:
    """The checkpoint that `resume` names: itself or the last of its run's directory; none for auto and never."""
    if resume in ("auto", "never"):
        return None
    path = Path(resume).expanduser()
    if (path / STATE).exists():
        return path
    checkpoints = complete_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise DirlError(f"{path} holds no checkpoint: give resume= a directory that holds {STATE}, or that of a run")
    return checkpoints[-1]


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory` by step; what a crash left half-written has another name."""
    with_files = {path.parent for path in directory.glob("step-*/*")}
    checkpoints = [path for path in with_files if step_digits(path).isdigit()]
    return sorted(checkpoints, key=lambda path: int(step_digits(path)))


def step_digits(path: Path) -> str:
    return path.name.removeprefix("step-")


def damage(path: Path, reader: int = 0, readers: int = 1) -> str | None:
    """Why a checkpoint is not as it was written, in a few words. Each of several readers looks at some of its files."""
    # The checksums are written last: without them, or without the state among them, it is not whole.
    lines = []
    if (path / SUMS).is_file():
        lines = (path / SUMS).read_text(errors="replace").splitlines()
    sums = []
    for line in lines:
        match = re.fullmatch(r"(\w{64})  ([\w.-]+)", line)
        if match is None:
            return f"{SUMS} is missing or damaged"
        sums.append((match[1], match[2]))
    if STATE not in {name for _, name in sums}:
        return f"{SUMS} is missing or damaged"

    # Reading is what takes time: the files are dealt out to the readers.
    for digest, name in sums[reader::readers]:
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"{name} is not what {SUMS} says"
    return None


def optimizer_states(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """The optimizers' states by parameter and key, such as `layers.0.weight.exp_avg`."""
    states = {}
    for name, parameter in trainable_parameters(model).items():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                states[f"{name}.{key}"] = value
    return states


def optimizer_names(optimizers: Optimizers) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
