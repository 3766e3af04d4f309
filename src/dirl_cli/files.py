"""Writing files so that neither a full disk nor a crash costs what is already there; what is installed."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
            f"{path} cannot be written ({reason}): make room or give out=DIR another disk,"
            " then the same command goes on from what is there"
        ) from error


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a file, and its directory where it is not there: whoever looks finds all of the old or all of the new."""
    partial = partial_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that takes the place of `path` only once it is filled and on the disk."""
    partial = partial_path(path)
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


def partial_path(path: Path) -> Path:
    """What a file or directory is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


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


def installed(package: str) -> str | None:
    """The version of an installed package; a checkout that is only on Python's path has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def conf_dir() -> Path:
    """The config tree: inside the package once installed, at the top of the repository in a checkout."""
    here = Path(__file__).parent
    return here / "conf" if (here / "conf").is_dir() else here.parents[1] / "conf"
