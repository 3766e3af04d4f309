"""Find the run directories below a directory."""

import os
from collections.abc import Iterator
from pathlib import Path

from dirl_cli.errors import DirlError, did_you_mean

RUNS = Path("runs")
LONGEST_HINT = 100  # letters: of many runs not all are named
MARKS = ("environment.json", "lock")  # which a start writes beside config.yaml, and hardly anybody else
PARTS = {"model", "checkpoints", "rollouts", "adapter", "tensorboard", "wandb"}  # of a run, with no run in them


def is_run(directory: Path) -> bool:
    """Whether a directory is one that a run was started in."""
    return (directory / "config.yaml").is_file() and any((directory / mark).is_file() for mark in MARKS)


def find_runs(root: Path) -> Iterator[Path]:
    """The runs in a directory and below, itself included; what cannot be read is passed over, and links in it are."""
    for name, below, _ in os.walk(root):
        directory = Path(name)
        has_run = is_run(directory)
        # A sweep keeps its runs in the directory of a run's name; what a run itself is made of is not looked through.
        below[:] = sorted(entry for entry in below if not entry.startswith(".") and not (has_run and entry in PARTS))
        if has_run:
            yield directory


def run_named(name: str) -> Path:
    """The run that a path or a name in runs/ stands for; a path within a run, such as its model's, stands for it too.

    Raises DirlError where there is none.
    """
    for path in (Path(name).expanduser(), RUNS / name):
        if is_run(path):
            return path
        for parent in path.parents[:3]:
            if path.exists() and is_run(parent):
                return parent
    if Path(name).is_dir():
        raise DirlError(f"{name} is no run's directory: dirl runs {name} lists those in it")
    names = [run.relative_to(RUNS).as_posix() for run in find_runs(RUNS)]
    hint = did_you_mean(name, names) if names else "begin one with dirl sft"
    raise DirlError(f"{name} is no run: {hint if len(hint) < LONGEST_HINT else 'dirl runs lists them'}")
