"""Writing files so that neither a full disk nor a crash costs what is already there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dirl_cli.errors import DirlError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell a full disk or a missing permission in one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).split(": ")[-1].partition(" (os error")[0]
        raise DirlError(
            f"{path} cannot be written ({reason}): make room or give out=DIR another disk, "
            "then run the same command to go on from the last checkpoint"
        ) from error


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that takes the place of `path` only once it is filled and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            remove(path)
            partial.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a directory at once: whoever looks sees all of it or nothing."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
