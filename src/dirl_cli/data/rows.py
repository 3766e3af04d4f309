"""Rows of data, wherever they are: JSON, JSONL and Parquet files, directories of them, data sets of the Hub."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import constants, metadata_load

from dirl_cli.errors import DirlError

HALVES = re.compile(r"\\ud[89a-f]", re.IGNORECASE)  # of characters; two of them make one
OUTSIDE = re.compile(r"^[/~\\]|(?:^|[/\\])\.\.(?:[/\\]|$)|::?//|::")
KINDS = ("json", "parquet", "csv", "text", "arrow")  # of data sets, as `datasets` calls them
FILES = (".json", ".jsonl", ".gz", ".parquet")


class Row(NamedTuple):
    """One object of a source and where it stands there, such as `data.jsonl line 3`."""

    place: str
    fields: dict[str, Any]


def read_rows(source: str | Path, split: str | None = None, config: str | None = None) -> list[Row]:
    """The rows of a file, of a directory of files, or of a data set OWNER/NAME that was downloaded before.

    split, config: which part of a directory or data set; None takes its only one.
    Raises DirlError that names the line that is malformed, or says what is missing.
    """
    path = Path(source)
    if path.is_dir():
        rows = data_set_rows(str(source), path, split, config)
    elif not path.exists() and path.suffix not in FILES and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        from dirl_cli.hub import local

        rows = data_set_rows(str(source), local(str(source), "dataset"), split, config)
    elif path.suffix == ".parquet" and path.exists():
        rows = parquet_rows(path)
    else:
        rows = json_rows(path)
    if not rows:
        raise DirlError(f"{source} holds no rows: give one with some")
    return rows


def data_set_rows(source: str, directory: Path, split: str | None, config: str | None) -> list[Row]:
    """The rows of a directory laid out as data sets of the Hub are, the names of its files telling the splits."""
    import datasets  # takes a second to import

    datasets.disable_progress_bars()
    require_inside(directory)
    try:
        builder = datasets.load_dataset_builder(str(directory.resolve()), config, cache_dir=str(cache_directory()))
        if builder.name not in KINDS:
            raise ValueError(f"it holds {builder.name}, and read are {', '.join(KINDS)}")
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DirlError(f"{source} cannot be read as a data set ({reason}): correct it, or give one file") from error
    if split not in splits and (split or len(splits) > 1):
        raise DirlError(f"{source} has the splits {' and '.join(splits)}: choose one with bench.split= or data.split=")
    rows = splits[split or next(iter(splits))]
    return [Row(f"{source} row {i}", fields) for i, fields in enumerate(rows, start=1)]


def require_inside(directory: Path) -> None:
    """Raises DirlError for a data set whose description sends its reader to other places than its own directory."""
    for file in filter(Path.exists, (directory / "README.md", directory / ".huggingface.yaml")):
        try:
            header = metadata_load(file) if file.suffix == ".md" else yaml.safe_load(file.read_bytes())
        except (ValueError, yaml.YAMLError, OSError) as error:
            raise DirlError(f"{file} has a header that cannot be read ({' '.join(str(error).split())})") from error
        parts = header.get("configs") if isinstance(header, dict) else None
        places = [part.get(key) for part in parts or () if isinstance(part, dict) for key in ("data_files", "data_dir")]
        if outside := [text for text in texts(places) if OUTSIDE.search(text)]:
            raise DirlError(f"{file} sends its reader to {outside[0]}, out of its directory: correct or remove it")


def texts(node: Any) -> Iterator[str]:
    """Every text in nested lists and objects."""
    if isinstance(node, str):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from texts(inner)


def cache_directory() -> Path:
    """Where the `datasets` library keeps what it has read, by its own environment variable or the Hub's."""
    return Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets")).expanduser()


def parquet_rows(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DirlError(f"{path} is not a Parquet file that can be read: {error}") from error
    return [Row(f"{path} row {i}", fields) for i, fields in enumerate(rows, start=1)]


def json_rows(path: Path) -> list[Row]:
    try:
        data = path.read_bytes()
        content = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DirlError(f"{path} does not exist: check the path") from error
    except UnicodeDecodeError as error:
        raise DirlError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DirlError(f"{path} cannot be read ({reason}): give a JSON, JSONL or Parquet file") from error
    rows = list(json_list(path, content) if content.lstrip().startswith("[") else json_lines(path, content))
    has_halves = HALVES.search(content)
    for row in rows:
        if not isinstance(row.fields, dict):
            raise DirlError(f"{row.place} is not a JSON object but {json.dumps(row.fields)[:40]}: correct it")
        if has_halves:
            require_text(row)
    return rows


def require_text(row: Row) -> None:
    """Raises DirlError for half a character, which JSON can spell and no tokenizer takes."""
    try:
        json.dumps(row.fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DirlError(f"{row.place} holds {half}, which is half a character: correct or remove it") from error


def json_list(path: Path, content: str) -> Iterator[Row]:
    try:
        items = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise malformed(f"{path} line {getattr(error, 'lineno', 1)}", error) from error
    return (Row(f"{path} item {i}", item) for i, item in enumerate(items, start=1))


def json_lines(path: Path, content: str) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            yield Row(place, json.loads(line))
        except (ValueError, RecursionError) as error:
            raise malformed(place, error) from error


def malformed(place: str, error: ValueError | RecursionError) -> DirlError:
    reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "it cannot be held"
    return DirlError(f"{place} is not valid JSON ({reason}): correct or remove it")
