"""The checkpoints of a run: when its best is, which of them stay, written whole or not at all, also in background.

What is in one, and how it is read, is in stored_checkpoint.py.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from math import inf, isfinite, nan
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.files import atomic_directory, partial_path, remove, sync, writing
from dirl_cli.models.peft import trainable_parameters
from dirl_cli.training.background_write import BackgroundWrite
from dirl_cli.training.shards import Shard, write_shards
from dirl_cli.training.stored_checkpoint import (
    MODEL,
    OPTIMIZER,
    SUMS,
    NamedTensors,
    Optimizers,
    complete_checkpoints,
    damage,
    find_checkpoint,
    optimizer_names,
    optimizer_states,
    sha256,
)
from dirl_cli.types import STATE

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
        self._background_write = BackgroundWrite("checkpoint")
        # The thread's own group, so that its messages do not get between the training's.
        self._group = None
        if accelerator.num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        # What a crash left half-written has a name of its own, and is of no use.
        if accelerator.is_main_process:
            for unfinished in directory.glob(".step-*"):
                shutil.rmtree(unfinished)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background_write.__exit__(kind, error, trace)

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

        # What this run saved itself comes before what `resume` names, so that the same command goes on after a stop.
        if latest is None:
            latest = find_checkpoint(resume)
            if latest and self._is_damaged(latest, damaged):
                raise DirlError(f"{latest} is damaged ({damaged[latest]}): give resume= another checkpoint")
        return latest

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metric that tells the best is here, and better than in every checkpoint."""
        best_so_far = -inf
        if self._record:
            best_so_far, _ = self._record
        return self._goodness(metrics) > best_so_far

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Optimizers,
        metrics: Mapping[str, float],
        further: NamedTensors | None = None,
        **remembered: Any,
    ) -> Path:
        """Write a checkpoint, whole or not at all, then drop those that are not to be kept.

        further: more tensors to keep, by the name of their file. remembered: plain values, which `load_checkpoint`
        gives back.
        """
        self.wait()
        if self.is_best(metrics):
            self._record = self._goodness(metrics), -step
        measured = {}
        if self.best and self.best in metrics:
            measured[self.best] = metrics[self.best]
        state = {"step": step, "optimizers": optimizer_names(optimizers), "measured": measured, **remembered}
        files = self._own_files(MODEL, trainable_parameters(model))
        files |= self._own_files(OPTIMIZER, optimizer_states(model, optimizers))
        for name, tensors in (further or {}).items():
            files |= self._own_files(name, tensors)

        # Training goes on to change the tensors while a thread writes: it writes copies.
        path = self.directory / f"step-{step:06d}"
        if self._in_background:
            copies = {}
            for name, shards in files.items():
                copies[name] = {key: shard.copy() for key, shard in shards.items()}
            self._background_write.start(self._write, path, copies, state)
        else:
            self._write(path, files, state)
        return path

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; raises what came in between."""
        self._background_write.wait()

    def _own_files(self, kind: str, tensors: Mapping[str, Tensor]) -> Files:
        """What this process writes: its shards, and the main process all tensors that are not sharded."""
        # A tensor may stay whole beside sharded ones, as a count of steps does: it is written once.
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
        if is_main:
            return {f"{kind}.safetensors": own}
        return {}

    def _write(self, path: Path, files: Files, state: Mapping[str, Any]) -> None:
        """Write all processes' files into one directory, which gets its name when the last is on the disk."""
        if not self.accelerator.is_main_process:
            self._write_files(partial_path(path), files)
            return
        with atomic_directory(path) as partial:
            sums = self._write_files(partial, files)
            (partial / STATE).write_text(json.dumps(state) + "\n")
            sums[STATE] = sha256(partial / STATE)
            lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
            (partial / SUMS).write_text("".join(lines))
        self._drop_old()

    def _drop_old(self) -> None:
        """Remove all but the last `keep` checkpoints and the best one."""
        if self.keep == 0:
            return
        best = None
        if self._record:
            _, minus_step = self._record
            best = self.directory / f"step-{-minus_step:06d}"
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
        findings = [damage(path, accelerator.process_index, accelerator.num_processes)]
        if accelerator.num_processes > 1:
            findings = gather_object(findings)
        damages = [reason for reason in findings if reason]
        if damages:
            reasons[path] = damages[0]
        return bool(damages)

    def _goodness(self, metrics: Mapping[str, float]) -> float:
        """The metric that decides which checkpoint is best, the higher the better; -inf where it is not finite."""
        value = metrics.get(self.best or "", nan)
        if not isfinite(value):
            return -inf
        if self.best and "loss" in self.best:
            return -value
        return value

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
