"""Log metrics: one line of JSON per step, and beside it to a tracker by choice."""

import json
import time
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from dirl_cli.files import write_text, writing
from dirl_cli.report.plot import Panel, plot

Metrics = Mapping[str, float]


class Tracker(Protocol):
    """A service or file format that gets the metrics too, beside metrics.jsonl: accelerate's trackers are such."""

    def log(self, values: Metrics, step: int) -> None: ...

    def finish(self) -> None: ...


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
        self.tracker.log(metrics, step=step)

    def draw(self, panels: Sequence[Panel], title: str, file: Path) -> None:
        """The picture of the run so far."""
        plot(self.history, panels, title, file)

    def close(self) -> None:
        self.file.close()
        self.tracker.finish()


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
