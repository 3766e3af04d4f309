"""Log metrics: one line of JSON per step, and TensorBoard or W&B beside it by choice."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from dirl_cli.errors import DirlError
from dirl_cli.files import write_text, writing
from dirl_cli.report.plot import Panel, plot

Metrics = Mapping[str, float]


class Tracker(Protocol):
    """A service or file format that gets the metrics too, beside metrics.jsonl."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """`metrics.jsonl` of a run that goes on after `step`: later lines are dropped, so that no step has two.

    Each line holds `step`, the metrics, and in `time` when it was written, in seconds since 1970.
    """

    def __init__(self, path: Path, step: int, tracker: Tracker) -> None:
        self.path = path
        self.tracker = tracker
        self.history = [line for line in read_metrics(path) if line["step"] <= step]
        write_text(path, (json.dumps(line) + "\n" for line in self.history))
        with writing(path):
            self.file = path.open("a", buffering=1)

    def write(self, step: int, metrics: Metrics) -> None:
        metrics = {name: value for name, value in metrics.items() if isfinite(value)}  # what JSON can say
        line = {"step": step, "time": round(time.time(), 3), **metrics}
        self.history.append(line)
        with writing(self.path):
            self.file.write(json.dumps(line) + "\n")
        self.tracker.log(step, metrics)

    def draw(self, panels: Sequence[Panel], title: str, file: Path) -> None:
        """The picture of the run so far."""
        plot(self.history, panels, title, file)

    def close(self) -> None:
        self.file.close()
        self.tracker.close()


class NoLog:
    """The log of a process that is not the main one."""

    def write(self, step: int, metrics: Metrics) -> None:
        pass

    def draw(self, panels: Sequence[Panel], title: str, file: Path) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; one that a crash cut short ends it."""
    if not path.exists():
        return []
    lines: list[dict[str, float]] = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def metric_curves(path: Path, panels: Sequence[Panel]) -> dict[str, list[float]]:
    """The values of each metric of `panels` over a run, as far as its metrics file has them."""
    lines = read_metrics(path)
    curves = {}
    for panel in panels:
        for name in panel.curves:
            curves[name] = [line[name] for line in lines if name in line]
    return curves


class Logger(Protocol):
    """Settings of a tracker; `step` is where the run goes on."""

    def open(self, out: Path, config: Mapping[str, Any], step: int) -> Tracker: ...


def open_log(out: Path, step: int, logger: Logger, config: Any) -> MetricsLog:
    """The log of the run in `out`, which goes on after `step`. config: what the tracker shows of the run."""
    return MetricsLog(out / "metrics.jsonl", step, logger.open(out, config, step))


@dataclass(frozen=True)
class FileOnly:
    """No tracker: metrics.jsonl alone."""

    def open(self, out: Path, config: Mapping[str, Any], step: int) -> Tracker:
        return self

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class TensorBoard:
    """TensorBoard event files in the run's directory."""

    def open(self, out: Path, config: Mapping[str, Any], step: int) -> Tracker:
        return TensorBoardTracker(import_tracker("torch.utils.tensorboard", "tensorboard"), out / "tensorboard", step)


class TensorBoardTracker:
    def __init__(self, tensorboard: ModuleType, directory: Path, step: int) -> None:
        self.writer = tensorboard.SummaryWriter(str(directory), purge_step=step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases; a run that goes on is continued there. mode: online, offline or disabled."""

    project: str
    mode: str
    entity: str | None = None

    def open(self, out: Path, config: Mapping[str, Any], step: int) -> Tracker:
        wandb = import_tracker("wandb", "wandb")
        # A run that begins anew in the same directory is another one there.
        id_file = out / "wandb_run_id"
        is_resumed = step > 0 and id_file.exists()
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            name=out.name,
            dir=str(out),
            config=dict(config),
            id=id_file.read_text() if is_resumed else None,
            resume="allow" if is_resumed else None,
        )
        id_file.write_text(run.id)
        return WandbTracker(run)


class WandbTracker:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


def import_tracker(module: str, package: str) -> ModuleType:
    """Import a tracker's module. Raises DirlError where the package is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise DirlError(f"logger={package} needs the package {package} ({error}): pip install {package}") from error
