"""Files with an object a line, as they are or by gzip: how to open one, and which are those of a run's steps."""

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from dirl_cli.errors import DirlError

LEVEL = 6  # of gzip: 9 takes several times as long and saves a hundredth of the bytes
GZIP = 31  # zlib's window of 32 KiB behind gzip's header, in which it notes no time and no name
STEP_FILE = re.compile(r"step-(\d+)\.jsonl(?:\.gz)?")


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed where its name ends in .gz. Raises DirlError where it cannot be read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DirlError(f"{path} is no whole gzip file ({error}): copy it again, or remove it") from error
    except OSError as error:
        raise DirlError(f"{path} cannot be read ({error.strerror}): check the path") from error


def compressed(lines: Iterable[bytes]) -> Iterator[bytes]:
    """A gzip file in parts, one a line: the same bytes for the same lines, whenever it is written."""
    packer = zlib.compressobj(LEVEL, wbits=GZIP)
    for line in lines:
        yield packer.compress(line)
    yield packer.flush()


def plain_name(path: Path) -> Path:
    """The path without the .gz at its end."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def step_of(path: Path) -> int | None:
    """The step that a file is of, by its name; None where it is no step's."""
    match = STEP_FILE.fullmatch(path.name)
    return int(match[1]) if match else None


def step_files(directory: Path) -> dict[int, Path]:
    """The files of steps in a directory, by step in order; of two of a step the compressed one."""
    steps = {}
    for path in sorted(directory.glob("step-*")):
        step = step_of(path)
        if step is not None:
            steps[step] = path
    return dict(sorted(steps.items()))
