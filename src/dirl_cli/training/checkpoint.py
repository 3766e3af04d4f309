"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

What is random depends on the seed and the step alone, so that parameters, optimizer states and the step are all
there is to keep, and what a command wants to remember besides. Where the model is sharded, every process writes what
it holds; any number of processes reads any checkpoint.

    checkpoints/step-000012/
        model.safetensors       trained parameters in fp32, or model-00001-of-00002.safetensors, … where sharded
        optimizer.safetensors   states by parameter, such as layers.0.weight.exp_avg; likewise
        state.json              step, optimizers, measured metrics, and what the command remembers
        SHA256SUMS              of the files above, written last
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from math import inf, isfinite, nan
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.files import atomic_directory, partial_path, remove, sync, writing
from dirl_cli.models.load import DiffusionLM, pick_dtype
from dirl_cli.models.peft import trainable_parameters
from dirl_cli.training.shards import Shard, read_shards, stored_shapes, write_shards
from dirl_cli.types import STATE

MODEL = "model"
OPTIMIZER = "optimizer"
SUMS = "SHA256SUMS"  # written last; `sha256sum --check` reads it too
FORMER = {"beside": "base_fingerprint", "began_as": "base_fingerprint"}  # what keys of a state.json were once called
UNSHARDED_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
Optimizers = Sequence[torch.optim.Optimizer]
Files = dict[str, dict[str, Shard]]  # what a process writes: tensors by name, by the name of their file


class RunCheckpoints:
    """The last `keep` checkpoints in `directory` and the best one, a directory per step. Every process calls.

    keep: 0 keeps all. best: by which metric, if any. in_background: `save` copies, a thread writes, and the next
    `save` or the end of the context waits for it and raises what it raised.
    """

    def __init__(
        self,
        directory: Path,
        accelerator: Accelerator,
        keep: int,
        best: str | None = None,
        in_background: bool = False,
    ) -> None:
        self.directory = directory
        self.accelerator = accelerator
        self.keep = keep
        self.best = best
        self._record: tuple[float, int] | None = None  # how good the best is, and minus its step
        self._in_background = in_background
        self._pending_write: Future[None] | None = None
        # The thread's own group, so that its messages do not get between the training's.
        self._group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        if accelerator.is_main_process:
            for unfinished in directory.glob(".step-*"):  # by a crash
                shutil.rmtree(unfinished)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._pending_write:
            self._pending_write.exception()  # it is written to its end, but what is reported is why the run ended

    def begin(self, resume: str, say: Callable[[str], None]) -> Path | None:
        """Where the run goes on: from the last good checkpoint here, or without any from the one that `resume` names.

        Damaged ones are reported through `say` and set aside. Raises DirlError where all are damaged, or where the
        named one is.
        """
        checkpoints = complete_checkpoints(self.directory)
        damaged: dict[Path, str] = {}
        latest = self._latest_good(checkpoints, damaged)
        if damaged and latest is None:
            path, reason = next(iter(damaged.items()))
            raise DirlError(f"{path} is damaged ({reason}), and so are all before it: begin anew with resume=never")

        for path, reason in damaged.items():
            aside = path.with_name(f"{path.name}.damaged")
            say(f"{path} is damaged ({reason}) and from now on called {aside.name}")
            if self.accelerator.is_main_process:
                remove(aside)
                path.rename(aside)

        # The best so far may be older than the latest, so that all good ones are asked.
        records = [self._record_of(path) for path in checkpoints if path not in damaged]
        self._record = max((record for record in records if record is not None), default=None)

        if latest is None:
            latest = find_checkpoint(resume)
            if latest and self._is_damaged(latest, damaged):
                raise DirlError(f"{latest} is damaged ({damaged[latest]}): give resume= another checkpoint")
        return latest

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metric that tells the best is here, and better than in every checkpoint."""
        best_so_far = self._record[0] if self._record else -inf
        return self._goodness(metrics) > best_so_far

    def save(
        self, step: int, model: nn.Module, optimizers: Optimizers, metrics: Mapping[str, float], **remembered: Any
    ) -> Path:
        """Write a checkpoint, whole or not at all, then drop those that are not to be kept.

        remembered: plain values, which `load_checkpoint` gives back.
        """
        self.wait()
        if self.is_best(metrics):
            self._record = self._goodness(metrics), -step
        measured = {name: metrics[name] for name in [self.best] if name and name in metrics}
        state = {"step": step, "optimizers": optimizer_names(optimizers), "measured": measured, **remembered}
        files = self._own_files(MODEL, trainable_parameters(model))
        files |= self._own_files(OPTIMIZER, optimizer_states(model, optimizers))

        path = self.directory / f"step-{step:06d}"
        if self._in_background:
            copies = {}
            for name, shards in files.items():
                copies[name] = {key: shard.copy() for key, shard in shards.items()}
            thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._pending_write = thread.submit(self._write, path, copies, state)
            thread.shutdown(wait=False)  # which ends it with what it writes
        else:
            self._write(path, files, state)
        return path

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; raises what came in between."""
        pending = self._pending_write
        self._pending_write = None
        if pending:
            pending.result()

    def _own_files(self, kind: str, tensors: Mapping[str, Tensor]) -> Files:
        """What this process writes: its shards, and the main process all tensors that are not sharded."""
        is_main = self.accelerator.is_main_process
        own = {}
        is_sharded = False
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                is_sharded = True
            if is_main or isinstance(tensor, DTensor):
                own[name] = Shard.of(tensor)

        if is_sharded:
            number = f"{self.accelerator.process_index + 1:05d}-of-{self.accelerator.num_processes:05d}"
            return {f"{kind}-{number}.safetensors": own}
        return {f"{kind}.safetensors": own} if is_main else {}

    def _write(self, path: Path, files: Files, state: Mapping[str, Any]) -> None:
        """Write all processes' files into one directory, which gets its name when the last is on the disk."""
        if not self.accelerator.is_main_process:
            self._write_files(partial_path(path), files)
            return
        with atomic_directory(path) as partial:
            sums = self._write_files(partial, files)
            (partial / STATE).write_text(json.dumps(state) + "\n")
            sums[STATE] = sha256(partial / STATE)
            (partial / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
        self._drop_old()

    def _drop_old(self) -> None:
        """Remove all but the last `keep` checkpoints and the best one."""
        if self.keep == 0:
            return
        best = self.directory / f"step-{-self._record[1]:06d}" if self._record else None
        for path in complete_checkpoints(self.directory)[: -self.keep]:
            if path != best:
                remove(path)

    def _write_files(self, directory: Path, files: Files) -> dict[str, str]:
        """Write this process's files; returns the checksums of every process's, or raises what any of them raised."""
        self._exchange(None)  # that the directory is there
        own_sums: dict[str, str] = {}
        try:
            for name, shards in files.items():
                with writing(directory / name):
                    write_shards(directory / name, shards)
                    sync(directory / name)
                    own_sums[name] = sha256(directory / name)
        except DirlError as failure:
            results = self._exchange(failure)
        else:
            results = self._exchange(own_sums)

        # A process that failed fails in all of them: none may wait for the others' files.
        sums: dict[str, str] = {}
        for result in results:
            if isinstance(result, DirlError):
                raise result
            sums |= result
        return sums

    def _exchange(self, message: Any) -> list[Any]:
        """Send a message to every process; returns all of theirs, in the order of the processes."""
        messages = [message] * self.accelerator.num_processes
        if self._group:
            torch.distributed.all_gather_object(messages, message, group=self._group)
        return messages

    def _latest_good(self, checkpoints: Sequence[Path], reasons: dict[Path, str]) -> Path | None:
        """The last checkpoint that is not damaged; notes the reason of each damaged one after it."""
        for path in reversed(checkpoints):
            if not self._is_damaged(path, reasons):
                return path
        return None

    def _is_damaged(self, path: Path, reasons: dict[Path, str]) -> bool:
        """Whether a checkpoint is damaged, with the reason noted. Each process looks at its share of the files."""
        accelerator = self.accelerator
        own = [damage(path, accelerator.process_index, accelerator.num_processes)]
        every = gather_object(own) if accelerator.num_processes > 1 else own
        damages = [reason for reason in every if reason]
        if damages:
            reasons[path] = damages[0]
        return bool(damages)

    def _goodness(self, metrics: Mapping[str, float]) -> float:
        """The metric that decides which checkpoint is best, the higher the better; -inf where it is not finite."""
        value = metrics.get(self.best or "", nan)
        if self.best and "loss" in self.best:
            value = -value
        return value if isfinite(value) else -inf

    def _record_of(self, path: Path) -> tuple[float, int] | None:
        """How good a checkpoint is, if that was measured, and minus its step, so that the first of equals is best."""
        with suppress(OSError, ValueError, KeyError):  # damaged and not needed
            state = json.loads((path / STATE).read_text())
            if self.best in state["measured"]:
                return self._goodness(state["measured"]), -state["step"]
        return None


def require_measured(best: str | None, measured: Collection[str]) -> None:
    """Refuse to keep the best by what this run does not measure."""
    if best and best not in measured:
        raise DirlError(f"keep_best={best} is not measured in this run: {did_you_mean(best, measured)}")


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


def load_checkpoint(path: Path, model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """Put a good checkpoint into the model and its optimizers; returns `step` and what else was remembered.

    Raises DirlError where it is one of another model or of other optimizers.
    """
    state = read_state(path)
    writers = " and ".join(state["optimizers"])
    readers = " and ".join(optimizer_names(optimizers))
    if writers != readers:
        raise DirlError(f"{path} was written by {writers}, not {readers}: give the optim= of its run")
    parameters = trainable_parameters(model)
    read_shards(checkpoint_files(path, MODEL), parameters)

    # An optimizer without steps has no states yet: make empty ones, read into them, then hand them over.
    files = checkpoint_files(path, OPTIMIZER)
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
    return state


def empty_states(shapes: Mapping[str, torch.Size], parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors for optimizer states by parameter and key, sharded as their parameter where they have its shape.

    shapes: by parameter and key, such as `layers.0.weight.exp_avg`.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, shape in shapes.items():
        name, key = full_name.rsplit(".", 1)
        parameter = parameters[name].detach()
        empty = torch.empty_like(parameter) if shape == parameter.shape else torch.empty(shape)
        states.setdefault(name, {})[key] = empty
    return states


def checkpoint_files(path: Path, kind: str) -> list[Path]:
    """The safetensors files of a checkpoint. kind: MODEL or OPTIMIZER."""
    return sorted(path.glob(f"{kind}*.safetensors"))


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

    for digest, name in sums[reader::readers]:
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"{name} is not what {SUMS} says"
    return None


def save_model(lm: DiffusionLM, dtype: str, directory: Path, card: str, accelerator: Accelerator) -> None:
    """Write the trained model in the published layout, its weights as `dtype`, which they keep from now on."""
    nn.Module.to(lm.model, dtype=pick_dtype(dtype, str(lm.device)))
    state: Any = get_model_state_dict(lm.model, options=UNSHARDED_ON_CPU)
    if accelerator.is_main_process:
        lm.save(directory, card, state)
    accelerator.wait_for_everyone()


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
