"""Where metrics go beside metrics.jsonl: each choice of `logger` opens one of accelerate's trackers.

accelerate's tell a service all that they are told. What a run that goes on takes twice is left out here, and what the
service calls the run is kept in the run's directory, so that it is the same run there.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from dirl_cli.errors import DirlError
from dirl_cli.files import write_text, writing
from dirl_cli.report.metrics_log import Metrics, Tracker

Config = Mapping[str, Any]


@dataclass(frozen=True)
class FileOnly:
    """No tracker: metrics.jsonl alone."""

    def open(self, out: Path, config: Config, step: int) -> Tracker:
        return self

    def log(self, values: Metrics, step: int) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class TensorBoard:
    """TensorBoard event files in the run's directory; it hides by itself what comes again after `purge_step`."""

    def open(self, out: Path, config: Config, step: int) -> Tracker:
        tracker = TensorBoardTracker("tensorboard", out, purge_step=step + 1)
        start(tracker, "tensorboard")
        if step < 0:
            tracker.log({"config": f"```json\n{json.dumps(config, indent=2)}\n```"}, step=0)
        return tracker


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases. mode: online, offline or disabled."""

    project: str
    mode: str
    entity: str | None = None

    def open(self, out: Path, config: Config, step: int) -> Tracker:
        file = out / "wandb_run_id"
        run_id, told = known_run(file, step)
        tracker = WandBTracker(
            self.project,
            entity=self.entity,
            mode=self.mode,
            name=out.name,
            dir=str(out),
            config=dict(config),
            id=run_id,
            resume="allow" if run_id else None,
        )
        start(tracker, "wandb")
        return ToldOnce(tracker, file, tracker.tracker.id, told)


@dataclass(frozen=True)
class Trackio:
    """Trackio, in the Hub's cache on this machine, where TRACKIO_SPACE_ID does not name a Space."""

    project: str

    def open(self, out: Path, config: Config, step: int) -> Tracker:
        file = out / "trackio_run_name"
        name, told = known_run(file, step)
        own_name = name or f"{out.name}-{secrets.token_hex(3)}"  # it finds runs by name: no two may share one
        resume = "allow" if name else "never"
        tracker = FinishedOnce(self.project, name=own_name, resume=resume, config=dict(config))
        start(tracker, "trackio")
        return ToldOnce(tracker, file, own_name, told)


@dataclass(frozen=True)
class Mlflow:
    """MLflow, in mlflow.db where the command is given, unless MLFLOW_TRACKING_URI names another place."""

    project: str

    def open(self, out: Path, config: Config, step: int) -> Tracker:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it else reports its use to its makers
        file = out / "mlflow_run_id"
        run_id, told = known_run(file, step)
        tracker = MLflowTracker(self.project, run_id=run_id, run_name=out.name)
        start_mlflow(tracker)
        if run_id is None:  # it lets no parameter change
            tracker.store_init_configuration(flat(config))
        return ToldOnce(tracker, file, tracker.tracker.info.run_id, told)


def start(tracker: GeneralTracker, package: str) -> None:
    """Import a tracker's package and begin. Raises DirlError where it is not installed."""
    try:
        tracker.start()
    except ImportError as error:
        raise not_installed(package, error) from error


def start_mlflow(tracker: MLflowTracker) -> None:
    """Begin, where MLflow can keep a run. Raises DirlError where no server answers or its database is not installed."""
    try:
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise not_installed("mlflow", error) from error

    try:
        start(tracker, "mlflow")
    except MlflowException as error:
        place = os.environ.get("MLFLOW_TRACKING_URI", "mlflow.db")
        raise DirlError(
            f"MLflow cannot keep a run in {place} ({' '.join(str(error).split())[:200]}): let MLFLOW_TRACKING_URI name "
            "where it can, or for a file pip install sqlalchemy alembic"
        ) from error


def not_installed(package: str, error: ImportError) -> DirlError:
    return DirlError(f"logger={package} needs the package {package} ({error}): pip install {package}")


class FinishedOnce(TrackioTracker):
    """accelerate's, which ends the run but leaves it Trackio's current one, to be ended again at exit."""

    def finish(self) -> None:
        import trackio

        trackio.finish()


def known_run(file: Path, step: int) -> tuple[str | None, int]:
    """What a tracker calls the run that goes on after `step`, and the last step it was told; None and -1 for a new one.

    A run that begins anew in the same directory is another one there.
    """
    if step < 0 or not file.exists():
        return None, -1
    run_id, *steps = file.read_text().splitlines()
    return run_id, int(steps[-1]) if steps else -1


class ToldOnce:
    """A tracker that is told each step once, whatever is taken again after a crash.

    file: remembers what the tracker calls the run, in its first line, and each step that it was told, in one more.
    """

    def __init__(self, tracker: Tracker, file: Path, run_id: str, told: int) -> None:
        self.tracker = tracker
        self.told = told
        write_text(file, f"{run_id}\n{told}\n")
        with writing(file):
            self.steps = file.open("a", buffering=1)

    def log(self, values: Metrics, step: int) -> None:
        if step > self.told:
            self.told = step
            self.steps.write(f"{step}\n")
            self.tracker.log(values, step=step)

    def finish(self) -> None:
        self.steps.close()
        self.tracker.finish()


def flat(config: Config, prefix: str = "") -> dict[str, str]:
    """The leaves of a config by their dotted keys, spelled as MLflow admits."""
    leaves: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{name}.")
        else:
            leaves[re.sub(r"[^\w\-. :/]", "_", name)] = str(value)
    return leaves
