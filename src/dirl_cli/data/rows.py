"""Rows of data, wherever they are: JSON, JSONL, CSV and Parquet files, directories of them, data sets of the Hub."""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml
from huggingface_hub import constants, metadata_load

from dirl_cli.errors import DirlError

SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)  # half a character as JSON spells it; two make one
OUTSIDE = re.compile(r"^[/~\\]|(?:^|[/\\])\.\.(?:[/\\]|$)|::?//|::")
NOT_BLANK = re.compile(r"\S")
KINDS = ("json", "parquet", "csv", "text", "arrow")  # of data sets, as `datasets` calls them
FILES = (".json", ".jsonl", ".gz", ".parquet", ".csv", ".tsv")
LONGEST_CELL = 2**31 - 1  # characters; by itself Python's reader stops at 131 072


class Row(NamedTuple):
    """One object of a source and where it stands there, such as `data.jsonl line 3`.

    notes: what was read otherwise than written. unread: the columns that nothing was made of.
    """

    location: str
    fields: dict[str, Any]
    notes: tuple[str, ...] = ()
    unread: Mapping[str, Any] = {}


class VerbatimFloat(float):
    """A number of a JSON file that remembers its digits, such as 2.50: an answer is compared as it was written."""

    digits: str

    def __str__(self) -> str:
        return self.digits

    @classmethod
    def read(cls, digits: str) -> float | Self:
        """The number that JSON's digits mean; a plain float where Python writes the same digits."""
        value = cls(digits)
        value.digits = digits
        return float(digits) if repr(float(digits)) == digits else value


def read_rows(source: str | Path, split: str | None = None, config: str | None = None) -> list[Row]:
    """The rows of a file, of a directory of files, or of a data set OWNER/NAME that was downloaded before.

    split, config: which part of a directory or data set; None takes its only one.
    Raises DirlError that names the line that is malformed, or says what is missing.
    """
    # What is on the disk goes before a data set of the same name.
    path = Path(source)
    if path.is_dir():
        rows = data_set_rows(str(source), path, split, config)
    elif not path.exists() and path.suffix not in FILES and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        from dirl_cli.hub import local_snapshot

        rows = data_set_rows(str(source), local_snapshot(str(source), "dataset"), split, config)
    elif path.suffix == ".parquet" and path.exists():
        rows = parquet_rows(path)
    elif {".csv", ".tsv"} & {suffix.lower() for suffix in path.suffixes[-2:]}:
        rows = table_rows(path)
    else:
        rows = json_rows(path)
    if not rows:
        raise DirlError(f"{source} holds no rows: give one with some")
    return rows


def data_set_rows(source: str, directory: Path, split: str | None, config: str | None) -> list[Row]:
    """The rows of a directory laid out as data sets of the Hub are, the names of its files telling the splits."""
    import datasets  # takes a second to import

    # `datasets` follows what a description says, so that this is looked at first; only formats that run no code pass.
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

    # One split needs no name; of several none is taken by guess.
    if split not in splits and (split or len(splits) > 1):
        raise DirlError(f"{source} has the splits {' and '.join(splits)}: choose one with bench.split= or data.split=")
    name = split or next(iter(splits))
    return [Row(f"{source} row {i}", fields) for i, fields in enumerate(splits[name], start=1)]


def require_inside(directory: Path) -> None:
    """Raises DirlError for a data set whose description names files outside its own directory."""
    for file in filter(Path.exists, (directory / "README.md", directory / ".huggingface.yaml")):
        try:
            header = metadata_load(file) if file.suffix == ".md" else yaml.safe_load(file.read_bytes())
        except (ValueError, yaml.YAMLError, OSError) as error:
            raise DirlError(f"{file} has a header that cannot be read ({' '.join(str(error).split())})") from error

        configs = header.get("configs") if isinstance(header, dict) else None
        paths = []
        for config in configs or ():
            if isinstance(config, dict):
                paths += [config.get("data_files"), config.get("data_dir")]
        for path in nested_texts(paths):
            if OUTSIDE.search(path):
                raise DirlError(f"{file} sends its reader to {path}, out of its directory: correct or remove it")


def nested_texts(node: Any) -> Iterator[str]:
    """Every text in nested lists and objects."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from nested_texts(value)
    elif isinstance(node, list):
        for item in node:
            yield from nested_texts(item)


def cache_directory() -> Path:
    """Where the `datasets` library keeps what it has read, by its own environment variable or the Hub's."""
    return Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets")).expanduser()


def parquet_rows(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DirlError(f"{path} is not a Parquet file that can be read ({error}): write or copy it again") from error
    return [Row(f"{path} row {i}", fields) for i, fields in enumerate(rows, start=1)]


def content_of(path: Path) -> str:
    """The text of a file, decompressed where its name ends in .gz. Raises DirlError where it cannot be read."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DirlError(f"{path} does not exist: check the path") from error
    except UnicodeDecodeError as error:
        raise DirlError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DirlError(f"{path} cannot be read ({reason}): give a JSON, JSONL, CSV or Parquet file") from error


def table_rows(path: Path) -> list[Row]:
    """The rows of a CSV or TSV file, whose first line names the columns. Cells are text, and empty ones are null.

    Raises DirlError that names the line that is malformed.
    """
    csv.field_size_limit(LONGEST_CELL)
    separator = "\t" if ".tsv" in path.name.lower() else ","
    lines = csv.reader(io.StringIO(content_of(path), newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        header = next(lines, [])
        for name in header:
            if header.count(name) > 1:
                raise DirlError(f"{path} has two columns called {name}: rename one")

        # A row may go over several lines: it stands where it begins.
        first_line = lines.line_num + 1
        for cells in lines:
            location = f"{path} line {first_line}"
            first_line = lines.line_num + 1
            if not cells:
                continue
            # A row of another length hints at a separator inside a cell: every cell behind it would be misread.
            if len(cells) != len(header):
                quote = "put a cell that holds the separator or a line break between double quotes"
                raise DirlError(f"{location} has {len(cells)} cells, and the first line names {len(header)}: {quote}")
            fields = {name: cell or None for name, cell in zip(header, cells, strict=True)}
            rows.append(Row(location, fields))
    except csv.Error as error:
        raise DirlError(f"{path} line {lines.line_num} is not valid CSV ({error}): correct or remove it") from error
    return rows


def json_rows(path: Path) -> list[Row]:
    """The objects of a JSON list, or of a file with one after another. Raises DirlError for what is no object."""
    content = content_of(path)
    if content.lstrip().startswith("["):
        rows = json_list(path, content)
    else:
        rows = json_lines(path, content)

    has_surrogates = SURROGATE.search(content)
    for row in rows:
        if not isinstance(row.fields, dict):
            raise DirlError(f"{row.location} is not a JSON object but {json.dumps(row.fields)[:40]}: correct it")
        if has_surrogates:
            require_text(row)
    return rows


def require_text(row: Row) -> None:
    """Raises DirlError for half a character, which JSON can spell and no tokenizer takes."""
    try:
        json.dumps(row.fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DirlError(f"{row.location} holds {half}, which is half a character: correct or remove it") from error


def json_list(path: Path, content: str) -> list[Row]:
    try:
        items = json.loads(content, parse_float=VerbatimFloat.read)
    except (ValueError, RecursionError) as error:
        raise malformed(f"{path} line {getattr(error, 'lineno', 1)}", error) from error
    return [Row(f"{path} item {i}", item) for i, item in enumerate(items, start=1)]


def json_lines(path: Path, content: str) -> list[Row]:
    """A value a line, or where that cannot be read, values over several lines one after another."""
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        location = f"{path} line {number}"
        # A line that is no value may be the first of an object over several: then all of the file is read that way.
        try:
            rows.append(Row(location, json.loads(line, parse_float=VerbatimFloat.read)))
        except (ValueError, RecursionError) as error:
            spread = spread_objects(path, content)
            if spread is None:
                raise malformed(location, error) from error
            return spread
    return rows


def spread_objects(path: Path, content: str) -> list[Row] | None:
    """The objects of a file that spreads each over several lines; None if it holds anything else."""
    decoder = json.JSONDecoder(parse_float=VerbatimFloat.read)
    rows = []
    line = 1
    position = 0
    while match := NOT_BLANK.search(content, position):
        start = match.start()
        line += content.count("\n", position, start)
        # raw_decode tells where the value ends, and so where the next begins.
        try:
            value, end = decoder.raw_decode(content, start)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        rows.append(Row(f"{path} line {line}", value))
        line += content.count("\n", start, end)
        position = end
    return rows


def malformed(location: str, error: ValueError | RecursionError) -> DirlError:
    """The error for a text that is no JSON, or nested too deep."""
    reason = "it cannot be held"
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg}, column {error.colno}"
    return DirlError(f"{location} is not valid JSON ({reason}): correct or remove it")
