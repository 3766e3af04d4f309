"""Data in files: a JSON list or one JSON object per line, read as demonstrations or as problems."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from dirl_cli.errors import DirlError
from dirl_cli.types import Problem


class Row(NamedTuple):
    """One object of a file and where it stands there, such as `data.jsonl line 3`."""

    place: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class TrainingFile:
    """Rows to learn from: `prompt` and `response` or `messages` to fine-tune, questions with answers to reinforce.

    held_out: rows kept out of training to validate on, chosen by `seed`; a share below 1, otherwise a number.
    instruction: what is asked of the model after each question, on a line of its own.
    """

    name: str
    path: str
    held_out: float = 0
    seed: int = 0
    instruction: str | None = None

    def demonstrations(self) -> list[dict]:
        """The rows to learn from, in the file's order."""
        return [demonstration(row) for row in self._split()[0]]

    def validation(self) -> list[dict]:
        """The rows held out."""
        return [demonstration(row) for row in self._split()[1]]

    def training_problems(self) -> list[Problem]:
        """The rows to reinforce on, each a question with its answer."""
        return [problem(row, f"{self.name}-{i}") for i, row in enumerate(self._split()[0])]

    def problems(self) -> list[Problem]:
        """Those of the rows held out that have a question with its answer."""
        rows = [row for row in self._split()[1] if {"question", "ground_truth_answer"} <= row.fields.keys()]
        return [problem(row, f"{self.name}-held-out-{i}") for i, row in enumerate(rows)]

    def _split(self) -> tuple[list[Row], list[Row]]:
        rows = read_rows(self.path)
        size = round(self.held_out * len(rows)) if self.held_out < 1 else int(self.held_out)
        if not 0 <= size < len(rows):
            raise DirlError(f"{self.path} has {len(rows)} rows, so {size} cannot be held out: lower data.held_out")
        out = set(Random(self.seed).sample(range(len(rows)), size))
        return [row for i, row in enumerate(rows) if i not in out], [rows[i] for i in sorted(out)]


@dataclass(frozen=True)
class ProblemFile:
    """A benchmark: rows of `question` and `ground_truth_answer`, and of `id` and `subset` where there are any.

    instruction: what is asked of the model after each question, on a line of its own.
    """

    name: str
    path: str
    instruction: str | None = None

    def problems(self) -> list[Problem]:
        stem = Path(self.path).stem
        problems = [problem(row, f"{stem}-{i}") for i, row in enumerate(read_rows(self.path))]
        known: set[str] = set()
        for one in problems:
            if one.id in known:
                raise DirlError(f"{self.path} holds two problems with the id {one.id}: make the ids differ")
            known.add(one.id)
        return problems


def demonstration(row: Row) -> dict:
    """The row, once its form is known to be one of the two."""
    fields = row.fields
    if "messages" in fields:
        messages = fields["messages"]
        good = isinstance(messages, list) and all(
            isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in messages
        )
        if not good or all(message["role"] != "assistant" for message in messages):
            raise DirlError(
                f"{row.place}: messages must be a list of objects with role and content, one of them the assistant's"
            )
    else:
        for key in ("prompt", "response"):
            text(row, key, "a demonstration has prompt and response, or messages")
    return fields


def problem(row: Row, default_id: str) -> Problem:
    expected = "a problem has question and ground_truth_answer"
    fields = row.fields
    return Problem(
        id=str(fields.get("id", default_id)),
        question=text(row, "question", expected),
        answer=text(row, "ground_truth_answer", expected),
        subset=str(fields.get("subset", "")),
    )


def text(row: Row, key: str, expected: str) -> str:
    """The field as text; a number is fine."""
    if key not in row.fields:
        raise DirlError(f"{row.place} has no {key}: {expected}")
    value = row.fields[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DirlError(f"{row.place}: {key} must be text, not {json.dumps(value)[:40]}")
    return str(value)


def read_rows(path: str | Path) -> list[Row]:
    """Every object of the file. Raises DirlError, naming the line or item, for anything that is not one."""
    path = Path(path)
    if path.suffix == ".parquet" and path.exists():
        return parquet_rows(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DirlError(f"{path} does not exist: check the path") from error
    except UnicodeDecodeError as error:
        raise DirlError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise DirlError(f"{path} cannot be read ({error.strerror}): give a JSON or JSONL file") from error
    rows = list(json_list(path, content) if content.lstrip().startswith("[") else json_lines(path, content))
    if not rows:
        raise DirlError(f"{path} holds no rows: give a file with at least one")
    for row in rows:
        if not isinstance(row.fields, dict):
            raise DirlError(f"{row.place} is not a JSON object but {json.dumps(row.fields)[:40]}: correct it")
    return rows


def parquet_rows(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        fields = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DirlError(f"{path} is not a Parquet file that can be read: {error}") from error
    if not fields:
        raise DirlError(f"{path} holds no rows: give a file with at least one")
    return [Row(f"{path} row {i}", row) for i, row in enumerate(fields, start=1)]


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
