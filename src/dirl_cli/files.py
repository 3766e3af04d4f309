"""Atomic writes: neither a full disk nor a crash costs what is already there. Where the configs are."""

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

GO_ON = "make room or give out=DIR another disk, then the same command goes on from what is there"  # of runs


@contextmanager
def writing(path: Path, remedy: str = GO_ON) -> Iterator[None]:
    """Raise what goes wrong in the block, such as a full disk, as a DirlError with its remedy. path: is written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError):
            reason = error.strerror
        else:  # safetensors quotes the system: … I/O error: No space left on device (os error 28)
            reason = str(error).split(": ")[-1].partition(" (os error")[0]
        raise DirlError(f"{path} cannot be written ({reason}): {remedy}") from error


def write_text(path: Path, text: str | Iterable[str], remedy: str = GO_ON) -> None:
    """Write a file atomically, and make its directory: a reader finds all of the old text or all of the new.

    text: one, or its lines with their line breaks. Raises DirlError with the remedy where it cannot be written.
    """
    lines = [text] if isinstance(text, str) else text
    write_bytes(path, (line.encode() for line in lines), remedy)


def write_bytes(path: Path, content: bytes | Iterable[bytes], remedy: str = GO_ON) -> None:
    """The same of bytes. content: all of it, or one part after another."""
    partial = partial_path(path)
    with writing(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            parts = [content] if isinstance(content, bytes) else content
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a directory to fill, which replaces `path` only once it is filled and on the disk.

    Where the block fails, `path` stays as it was. Raises DirlError where it cannot be written.
    """
    partial = partial_path(path)
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            # Contents are on the disk before the name is: else a crash of the machine may leave a name without them.
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            remove(path)
            partial.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """Where a file or directory is written before it replaces `path`: beside it, so that renaming is atomic."""
    return path.with_name(f".{path.name}.partial")


def unused_name(path: Path) -> Path:
    """The first of `path`~1, `path`~2, … that does not exist; of a file the number stands before the suffix."""
    suffix = path.suffix if path.is_file() else ""
    stem = path.name.removesuffix(suffix)
    n = 1
    while (candidate := path.with_name(f"{stem}~{n}{suffix}")).exists():
        n += 1
    return candidate


def remove(path: Path) -> None:
    """Delete a directory atomically: a reader sees all of it or nothing."""
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
