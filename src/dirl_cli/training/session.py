"""What fine-tuning and reinforcement do around their steps: show, evaluate, log, save, go on, and stop when asked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

import torch
from torch import nn

from dirl_cli.errors import Interrupted
from dirl_cli.report.metrics_log import MetricsLog, NoLog
from dirl_cli.report.plot import Panel
from dirl_cli.report.progress import StepProgress, due
from dirl_cli.training.checkpoint import RunCheckpoints
from dirl_cli.training.prepare import require_same_data
from dirl_cli.training.stop_signal import StopSignal
from dirl_cli.training.stored_checkpoint import (
    NamedTensors,
    load_checkpoint,
    load_other,
    require_same_run,
    require_same_teacher,
    tensors_of,
)
from dirl_cli.training.trainer import Trainer

Metrics = dict[str, float]


class Evaluation(Protocol):
    """What a run measures of its model. Both raise Interrupted where they were stopped before they had all."""

    def before_training(self) -> Metrics: ...

    def measure(self) -> Metrics: ...


@dataclass
class Session:
    """A training run from its first step to its last, however often it is stopped in between.

    command: `sft` or `rl`. steps: of the whole run. picture: where its curves are drawn. noted: the metrics of an
    evaluation that get a line of their own. state: what the command itself remembers, to be kept in checkpoints;
    further: and tensors, by the name of their file, which are read into on resuming. others: what learns beside the
    model, by the name of its file, such as a critic. before_saving: waits for what a checkpoint counts on.
    """

    command: str
    name: str
    steps: int
    seed: int
    save_every: int
    eval_every: int
    trainer: Trainer
    model: nn.Module
    checkpoints: RunCheckpoints
    progress: StepProgress
    stop: StopSignal
    panels: Sequence[Panel]
    picture: Path
    noted: Sequence[str]
    fingerprints: Mapping[str, str]  # base_, data_ and teacher_fingerprint: of the weights, rows and teacher at first
    state: Callable[[], Mapping[str, Any]] = dict
    further: NamedTensors = field(default_factory=dict)
    others: Mapping[str, Trainer] = field(default_factory=dict)
    before_saving: Callable[[], object] = dict
    log: MetricsLog | NoLog = field(default_factory=NoLog)
    step: int = 0  # steps that are finished
    saved_at: int = 0
    saved_in: Path | None = None
    evaluation: Evaluation | None = None
    unevaluated: Metrics | None = None  # of the last step, where its evaluation was given up to stop at once

    def resume(self, resume: str, needs_base: bool, data: str) -> dict[str, Any] | None:
        """Go on from the run's last good checkpoint, or from the one `resume` names; returns what that remembers.

        needs_base: whether the weights that the run began with are used besides those in the checkpoint. data: its
        name, for the sentence. Raises DirlError for a checkpoint of another command, other weights or other rows.
        """
        path = self.checkpoints.begin(resume, self.progress.print_line)
        if path is None:
            return None

        require_same_run(path, self.command, self.fingerprints["base_fingerprint"] if needs_base else None)
        remembered = load_checkpoint(path, self.model, self.trainer.optimizers, self.further)
        for name, other in self.others.items():
            if load_other(path, name, other.unwrapped, other.optimizers):
                other.restore(remembered[name], remembered["step"])
        rows = self.fingerprints["data_fingerprint"]
        if path.parent == self.checkpoints.directory:  # another run's checkpoint may have seen other data
            require_same_data(data, remembered.get("data_fingerprint", rows), rows)
            teacher = self.fingerprints.get("teacher_fingerprint")
            require_same_teacher(remembered.get("teacher_fingerprint", teacher), teacher)

        # Checkpoints of earlier versions did not count all of these: what they lack follows from the step.
        self.step = self.saved_at = remembered["step"]
        self.saved_in = path
        self.unevaluated = remembered.get("unevaluated")
        self.trainer.restore(remembered, self.step)
        self.progress.print_line(f"going on after step {self.step}, from {path}")
        return remembered

    @property
    def logged(self) -> int:
        """The last step whose line of metrics stays in the log; -1 for none, not even that of step 0."""
        if self.unevaluated is not None:
            return self.step - 1
        return self.step or -1

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._open.enter_context(self.checkpoints)
        self._open.enter_context(self.stop)
        self._open.enter_context(self.progress.after(self.step))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
        if error is None:
            self.log.close()
            self.progress.sum_up(self.trainer.times.total)

    def remaining_steps(self, evaluation: Evaluation | None) -> Iterator[int]:
        """The steps that are left, from 0. Every one has to end in `end_of_step`.

        evaluation: measures the model before the first step, every `eval_every` steps and at the end.
        """
        self.evaluation = evaluation
        if self.step == 0 and evaluation:
            self._evaluate_before_the_first_step(evaluation)
        if self.unevaluated is not None:
            self._finish_step(self.unevaluated)
        while self.step < self.steps:
            torch.manual_seed(self.seed + self.step)  # for models with dropout
            yield self.step

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Count the time under a phase."""
        return self.trainer.times(phase)

    @contextmanager
    def showing(self, phase: str = "") -> Iterator[None]:
        """Show that a phase of the step goes on.

        Where it is interrupted, what it did so far is given up and the run stops after the step before.
        """
        title = f"step {self.step + 1}/{self.steps}"
        try:
            with self.progress.working(f"{title} · {phase}" if phase else title):
                yield
        except Interrupted:
            if self.step > self.saved_at:
                self.save({})
            self._stop()

    def end_of_step(self, metrics: Metrics) -> None:
        """Report, evaluate and save where that is due, and stop where it was asked for."""
        self.step += 1
        self.progress.update(self.step, metrics)
        if metrics.get("skipped"):
            self.progress.note(self.step, metrics, "loss", "grad_norm", "skipped")
        self._finish_step(metrics)

    def save(self, metrics: Metrics, **more: Any) -> None:
        """Save the last whole step, of which these are the metrics."""
        self.before_saving()

        # What training depends on besides the tensors, then what the command itself remembers.
        trainer = self.trainer
        remembered = {
            "command": self.command,
            **self.fingerprints,
            **trainer.counts,
            **self.state(),
            **more,
        }
        further = dict(self.further)
        for name, other in self.others.items():
            remembered[name] = other.counts
            further |= tensors_of(name, other.unwrapped, other.optimizers)
        with trainer.times("saving"):
            self.saved_in = self.checkpoints.save(
                self.step, self.model, trainer.optimizers, metrics, further, **remembered
            )
            self.draw()
        self.saved_at = self.step

    def draw(self) -> None:
        """Draw the curves so far."""
        self.log.draw(self.panels, self.name, self.picture)

    def _evaluate_before_the_first_step(self, evaluation: Evaluation) -> None:
        try:
            with self.trainer.times("evaluation"):
                metrics = evaluation.before_training()
        except Interrupted:
            self._stop()
        if self.stop:
            self._stop()
        if metrics:
            self.log.write(0, metrics | self.trainer.times.take())
            self.progress.note(0, metrics, *self.noted)

    def _finish_step(self, metrics: Metrics) -> None:
        # The last step is always evaluated, so that what the run left is measured.
        is_last = self.step == self.steps
        evaluation = self.evaluation if is_last or due(self.step, self.eval_every) else None
        if evaluation:
            try:
                with self.trainer.times("evaluation"):
                    metrics = metrics | evaluation.measure()
            except Interrupted:  # to be made up for when the run goes on, which then writes the step's line
                self.save({}, unevaluated=metrics)
                self._stop()
            self.progress.note(self.step, metrics, *self.noted)
        self.unevaluated = None
        self.log.write(self.step, metrics | self.trainer.times.take())

        # While updates are skipped no checkpoint is written that would push out one from before the bad steps.
        is_due = due(self.step, self.save_every) and not self.trainer.skipped
        # One that is asked to stop at its last step simply ends.
        must_stop = bool(self.stop) and not is_last
        if is_last or must_stop or is_due or self.checkpoints.is_best(metrics):
            self.save(metrics)
        elif evaluation:
            self.draw()
        if must_stop:
            self._stop()

    def _stop(self) -> NoReturn:
        self.checkpoints.wait()
        bool(self.stop)  # so that every process knows of the signal that any has received
        raise self.stop.end(self.step, self.steps, self.saved_in)
