"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

What is random depends on the seed and the step alone, so that parameters, optimizer states and the step are all
there is to keep, and what a command wants to remember besides. Where the model is sharded, every process writes what
it holds; any number of processes reads any checkpoint.
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
from dirl_cli.files import partial_of, remove, sync, whole_directory, writing
from dirl_cli.models.load import DiffusionLM, pick_dtype
from dirl_cli.training.shards import Shard, read_shards, stored_shapes, write_shards
from dirl_cli.types import STATE

MODEL, OPTIMIZER = "model", "optimizer"  # .safetensors, or -00001-of-00002.safetensors where they are sharded
SUMS = "SHA256SUMS"  # written last; `sha256sum --check` reads it too
FORMER = {"beside": "base_fingerprint", "began_as": "base_fingerprint"}  # what keys of a state.json were once called
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
Optimizers = Sequence[torch.optim.Optimizer]
Files = dict[str, dict[str, Shard]]


class Checkpoints:
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
        self.directory, self.accelerator, self.keep, self.best = directory, accelerator, keep, best
        self._record: tuple[float, int] | None = None  # how good the best is, and minus its step
        self._in_background = in_background
        self._written: Future[None] | None = None
        # the thread's own, so that what it tells the others does not get between the training's
        self._group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        if accelerator.is_main_process:
            for left in directory.glob(".step-*"):  # by a crash
                shutil.rmtree(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._written:
            self._written.exception()  # it is written to its end, but what is told is why the run ended

    def begin(self, resume: str, say: Callable[[str], None]) -> Path | None:
        """Where the run goes on: from the last good checkpoint here, or without any from the one that `resume` names.

        Damaged ones are told and set aside. Raises DirlError where all are, or where the named one is.
        """
        here, damaged = complete(self.directory), dict[Path, str]()
        good = next((path for path in reversed(here) if not self._is_damaged(path, damaged)), None)
        if damaged and good is None:
            path, reason = next(iter(damaged.items()))
            raise DirlError(f"{path} is damaged ({reason}), and so are all before it: begin anew with resume=never")
        for path, reason in damaged.items():
            aside = path.with_name(f"{path.name}.damaged")
            say(f"{path} is damaged ({reason}) and from now on called {aside.name}")
            if self.accelerator.is_main_process:
                remove(aside)
                path.rename(aside)
        self._record = max((one for path in here if path not in damaged for one in self._measured(path)), default=None)
        if good is None and (good := find(resume)) and self._is_damaged(good, damaged):
            raise DirlError(f"{good} is damaged ({damaged[good]}): give resume= another checkpoint")
        return good

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metric that tells the best is here, and better than in every checkpoint."""
        return self._worth(metrics) > (self._record[0] if self._record else -inf)

    def save(
        self, step: int, model: nn.Module, optimizers: Optimizers, metrics: Mapping[str, float], **remembered: Any
    ) -> Path:
        """Write a checkpoint, whole or not at all, then drop those that are not kept. remembered: plain values."""
        self.wait()
        if self.is_best(metrics):
            self._record = self._worth(metrics), -step
        measured = {name: metrics[name] for name in [self.best] if name and name in metrics}
        state = {"step": step, "optimizers": kinds(optimizers), "measured": measured, **remembered}
        files = self._own(MODEL, learned(model)) | self._own(OPTIMIZER, states(model, optimizers))
        path = self.directory / f"step-{step:06d}"
        if self._in_background:
            copies = {name: {key: part.copy() for key, part in parts.items()} for name, parts in files.items()}
            thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._written = thread.submit(self._write, path, copies, state)
            thread.shutdown(wait=False)  # which ends it with what it writes
        else:
            self._write(path, files, state)
        return path

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; raises what came in between."""
        written, self._written = self._written, None
        if written:
            written.result()

    def _own(self, kind: str, tensors: Mapping[str, Tensor]) -> Files:
        """What this process writes: its parts of sharded tensors, and the main process all that are whole."""
        is_main = self.accelerator.is_main_process
        place = f"{self.accelerator.process_index + 1:05d}-of-{self.accelerator.num_processes:05d}"
        own = {name: Shard.of(one) for name, one in tensors.items() if is_main or isinstance(one, DTensor)}
        if any(isinstance(one, DTensor) for one in tensors.values()):
            return {f"{kind}-{place}.safetensors": own}
        return {f"{kind}.safetensors": own} if is_main else {}

    def _write(self, path: Path, files: Files, state: Mapping[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            self._write_files(partial_of(path), files)
            return
        with whole_directory(path) as partial:
            sums = self._write_files(partial, files)
            (partial / STATE).write_text(json.dumps(state) + "\n")
            sums[STATE] = sha256(partial / STATE)
            (partial / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
        best = self.directory / f"step-{-self._record[1]:06d}" if self._record else None
        for old in complete(self.directory)[: -self.keep]:
            if old != best:
                remove(old)

    def _write_files(self, directory: Path, files: Files) -> dict[str, str]:
        """Write this process's files; returns the checksums of every process's, or raises what any of them raised."""
        self._tell(None)  # that the directory is there
        sums: dict[str, str] = {}
        try:
            for name, parts in files.items():
                with writing(directory / name):
                    write_shards(directory / name, parts)
                    sync(directory / name)
                    sums[name] = sha256(directory / name)
        except DirlError as failure:
            everyone = self._tell(failure)
        else:
            everyone = self._tell(sums)
        for told in everyone:
            if isinstance(told, DirlError):
                raise told
            sums |= told
        return sums

    def _tell(self, mine: Any) -> list[Any]:
        """What every process tells the others."""
        told = [mine] * self.accelerator.num_processes
        if self._group:
            torch.distributed.all_gather_object(told, mine, group=self._group)
        return told

    def _is_damaged(self, path: Path, reasons: dict[Path, str]) -> bool:
        """Whether a checkpoint is damaged, with the reason noted. Each process looks at its share of the files."""
        accelerator = self.accelerator
        own = [damage(path, accelerator.process_index, accelerator.num_processes)]
        found = list(filter(None, gather_object(own) if accelerator.num_processes > 1 else own))
        if found:
            reasons[path] = found[0]
        return bool(found)

    def _worth(self, metrics: Mapping[str, float]) -> float:
        """The metric that tells the best, the higher the better."""
        value = metrics.get(self.best or "", nan)
        value = -value if self.best and "loss" in self.best else value
        return value if isfinite(value) else -inf

    def _measured(self, path: Path) -> list[tuple[float, int]]:
        """How good a checkpoint is, if that was measured, and minus its step."""
        with suppress(OSError, ValueError, KeyError):  # damaged and not needed
            state = json.loads((path / STATE).read_text())
            return [(self._worth(state["measured"]), -state["step"])] if self.best in state["measured"] else []
        return []


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


def load(path: Path, model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """Put a good checkpoint into the model and its optimizers; returns `step` and what else was remembered.

    Raises DirlError where it is one of another model or of other optimizers.
    """
    state = read_state(path)
    theirs, ours = (" and ".join(names) for names in (state["optimizers"], kinds(optimizers)))
    if theirs != ours:
        raise DirlError(f"{path} was written by {theirs}, not {ours}: give the optim= of its run")
    read_shards(files_of(path, MODEL), learned(model))
    files = files_of(path, OPTIMIZER)
    blank = blank_states(stored_shapes(files), learned(model))
    read_shards(files, {f"{name}.{key}": value for name, state in blank.items() for key, value in state.items()})
    names = {parameter: name for name, parameter in learned(model).items()}
    for optimizer in optimizers:
        # rates and betas are the configuration's, states the checkpoint's
        groups = optimizer.state_dict()["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        known = {i: blank[names[one]] for i, one in zip(numbers, parameters, strict=True) if names[one] in blank}
        optimizer.load_state_dict({"state": known, "param_groups": groups})
    return state


def blank_states(shapes: Mapping[str, torch.Size], parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Room for optimizer states, cut as their parameters are where they have the same shape."""
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, shape in shapes.items():
        name, key = full_name.rsplit(".", 1)
        like = parameters[name].detach()
        found.setdefault(name, {})[key] = torch.empty_like(like) if shape == like.shape else torch.empty(shape)
    return found


def files_of(path: Path, kind: str) -> list[Path]:
    return sorted(path.glob(f"{kind}*.safetensors"))


def find(resume: str) -> Path | None:
    """The checkpoint that `resume` names: itself or the last of its run's directory; none for auto and never."""
    if resume in ("auto", "never"):
        return None
    path = Path(resume).expanduser()
    found = [path] if (path / STATE).exists() else complete(path / "checkpoints")
    if not found:
        raise DirlError(f"{path} holds no checkpoint: give resume= a directory that holds {STATE}, or that of a run")
    return found[-1]


def complete(directory: Path) -> list[Path]:
    """The checkpoints in `directory` by step; what a crash left half-written has another name."""
    found = {path.parent for path in directory.glob("step-*/*") if path.parent.name[5:].isdigit()}
    return sorted(found, key=lambda path: int(path.name[5:]))


def damage(path: Path, reader: int = 0, readers: int = 1) -> str | None:
    """Why a checkpoint is not as it was written, in a few words. Each of several readers looks at some of its files."""
    lines = (path / SUMS).read_text(errors="replace").splitlines() if (path / SUMS).is_file() else []
    found = [match for line in lines if (match := re.fullmatch(r"(\w{64})  ([\w.-]+)", line))]
    if len(found) != len(lines) or STATE not in {match[2] for match in found}:
        return f"{SUMS} is missing or damaged"
    for digest, name in (match.groups() for match in found[reader::readers]):
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"{name} is not what {SUMS} says"
    return None


def save_model(lm: DiffusionLM, dtype: str, directory: Path, card: str, accelerator: Accelerator) -> None:
    """Write the trained model in the published layout, its weights as `dtype`, which they keep from now on."""
    nn.Module.to(lm.model, dtype=pick_dtype(dtype, str(lm.device)))
    state: Any = get_model_state_dict(lm.model, options=GATHERED)
    if accelerator.is_main_process:
        lm.save(directory, card, state)
    accelerator.wait_for_everyone()


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name; tied parameters once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def states(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """The optimizers' states by parameter, such as `layers.0.weight.exp_avg`."""
    return {
        f"{name}.{key}": value
        for name, parameter in learned(model).items()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def kinds(optimizers: Optimizers) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
