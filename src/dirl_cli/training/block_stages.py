"""Stages of a run in which blocks grow as what is held out stops improving: which block size each step has."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dirl_cli.training.session import Evaluation, Metrics

NOTHING_TELLS = (
    "annealing.patience ends a stage by what is held out, and nothing is: hold out some with data.held_out, or give"
    " annealing.share alone"
)


@dataclass
class BlockStages:
    """The block sizes that a run begins with, each until what is held out has stopped improving; then its own size.

    sizes: of the stages; final: of all steps after them. metric: what tells; the lower the better where it is a loss.
    patience: evaluations in a row that are no better than the best of their stage, after which that ends. least, most:
    its steps at the least and at the most.
    ended: of each stage that is over the first step, from 0, of the next. best, waited: of the present stage the best
    value, and the evaluations since.
    """

    sizes: tuple[int, ...]
    final: int
    metric: str
    patience: int
    least: int = 0
    most: int | None = None
    ended: list[int] = field(default_factory=list)
    best: float | None = None
    waited: int = 0

    def size(self, step: int) -> int:
        """The block size of a step, from 0, that is not beyond the next one."""
        self._end_overdue(step)
        for size, end in zip(self.sizes, self.ended, strict=False):
            if step < end:
                return size
        return self.final if self._is_over else self.sizes[len(self.ended)]

    def trained_size(self, steps: int) -> int:
        """The block size of the last of so many steps that are finished, or of the first."""
        return self.size(max(steps - 1, 0))

    def observe(self, step: int, metrics: Metrics) -> None:
        """Take in what was measured after so many steps, and end the stage where it is time to."""
        measured_in = len(self.ended)
        self._end_overdue(step)
        if self._is_over or len(self.ended) > measured_in or self.metric not in metrics:
            return
        value = metrics[self.metric]
        if "loss" in self.metric:
            value = -value
        if self.best is None or value > self.best:
            self.best = value
            self.waited = 0
        else:
            self.waited += 1
        if self.waited >= self.patience and step - self._began >= self.least:
            self._end(step)

    @property
    def _is_over(self) -> bool:
        return len(self.ended) >= len(self.sizes)

    @property
    def _began(self) -> int:
        """The first step of the present stage."""
        return self.ended[-1] if self.ended else 0

    def _end_overdue(self, step: int) -> None:
        while self.most is not None and not self._is_over and step - self._began >= self.most:
            self._end(self._began + self.most)

    def _end(self, step: int) -> None:
        self.ended.append(step)
        self.best = None
        self.waited = 0

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"ended": self.ended, "best": self.best, "waited": self.waited}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where `to_json` was called."""
        self.ended = list(saved["ended"])
        self.best = saved["best"]
        self.waited = saved["waited"]

    def __str__(self) -> str:
        """Such as: blocks of 4, of 8, each until greedy_accuracy has not improved for 2 evaluations."""
        sizes = ", ".join(f"of {size}" for size in self.sizes)
        return f"blocks {sizes}, each until {self.metric} has not improved for {self.patience} evaluations"


@dataclass(frozen=True)
class StagedEvaluation:
    """An evaluation that tells the stages of a run what it measured. step: how many steps are finished."""

    evaluation: Evaluation
    stages: BlockStages
    step: Callable[[], int]

    def before_training(self) -> Metrics:
        return self.evaluation.before_training()

    def measure(self) -> Metrics:
        """As the evaluation's own. Raises Interrupted where that does, and then tells nothing."""
        metrics = self.evaluation.measure()
        self.stages.observe(self.step(), metrics)
        return metrics
