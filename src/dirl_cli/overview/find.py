"""Find the run directories below a directory."""

import os
from collections.abc import Iterator
from pathlib import Path

MARKS = ("environment.json", "lock")  # which a start writes beside config.yaml, and hardly anybody else
PARTS = {"model", "checkpoints", "rollouts", "adapter", "tensorboard", "wandb"}  # of a run, with no run in them


def is_run(directory: Path) -> bool:
    """Whether a directory is one that a run was started in."""
    return (directory / "config.yaml").is_file() and any((directory / mark).is_file() for mark in MARKS)


def find_runs(root: Path) -> Iterator[Path]:
    """The runs in a directory and below, itself included; what cannot be read is passed over, and links in it are."""
    for name, below, _ in os.walk(root):
        directory = Path(name)
        found = is_run(directory)
        # A sweep keeps its runs in the directory of a run's name; what a run itself is made of is not looked through.
        below[:] = sorted(entry for entry in below if not entry.startswith(".") and not (found and entry in PARTS))
        if found:
            yield directory
