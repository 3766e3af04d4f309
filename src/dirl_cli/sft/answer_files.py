"""The files that sampled answers are in: the rollouts of `dirl rl`, and what `dirl generate` wrote."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dirl_cli.data.columns import rename_columns
from dirl_cli.data.rows import Row
from dirl_cli.data.verified_rows import is_verifiable, name_verifiers, verified_problem, verified_question
from dirl_cli.errors import DirlError
from dirl_cli.line_files import lines_of
from dirl_cli.rollout.storage import (
    TRAJECTORY_COLUMNS,
    Record,
    integer,
    read_lines,
    rollout_files,
    trajectory_from_json,
    value_of_type,
)
from dirl_cli.types import Problem

COMPLETIONS = "completions.jsonl"  # what `dirl generate` leaves
SETTING = "data.columns="  # how a user says which column is which
SAMPLED = {"index", "sample", "text", *TRAJECTORY_COLUMNS}  # the columns that are none of the prompt's


class Naming(NamedTuple):
    """How the prompts of `dirl generate` are made problems of.

    name: what their ids begin with. columns: how they call theirs, by our names. verifier, scorers: as in
    `name_verifiers`.
    """

    name: str
    columns: Mapping[str, str]
    verifier: str | None
    scorers: Sequence[str]


def read_records(path: Path, naming: Naming) -> list[tuple[str, Record]]:
    """All answers of a directory or file, each with its file and line. Raises DirlError for what is none."""
    answers: list[tuple[str, Record]] = []
    for file in answer_files(path):
        if is_rollout(file):
            answers += read_lines(file)
        else:
            answers += read_lines(file, partial(completion_record, file, naming))
    return answers


def answer_files(path: Path) -> list[Path]:
    """The files of answers in a directory, in order, or the file itself. Raises DirlError where there is none."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise DirlError(
            f"{path} is not there: sample answers with `dirl rl rl.rollout_only=true out={path}` or `dirl generate"
            f" input=FILE out={path}` first"
        )
    if (path / COMPLETIONS).exists():
        return [path / COMPLETIONS]
    return list(rollout_files(path).values())


def is_rollout(file: Path) -> bool:
    """Whether a file's first line is one of rollouts, which alone say of what problem it is and if it was kept."""
    try:
        line = json.loads(next(lines_of(file), b"{}"))
    except (ValueError, RecursionError):
        return True  # who reads it says what is wrong with it
    return isinstance(line, dict) and {"problem", "kept"} <= line.keys()


def completion_record(file: Path, naming: Naming, line: Any) -> Record:
    """A line that `dirl generate` wrote, graded by nobody yet. Raises as `from_json` does for anything else."""
    if not isinstance(line, dict):
        raise TypeError("a completion is an object")
    number = integer(line, "index")
    location = f"{file} index {number}"
    if "stop_token_ids" not in line:
        raise DirlError(f"{location} has no stop_token_ids, which earlier versions did not write: sample it again")
    if "text" in line and line["text"] is None:
        raise DirlError(f"{location} has no text, as its model had no tokenizer: sample with one that has")

    row = Row(location, {name: line[name] for name in line if name not in SAMPLED})
    rows = rename_columns([row], naming.columns, SETTING)
    [row] = name_verifiers(rows, naming.verifier, naming.scorers, SETTING)
    default_id = f"{naming.name}-{number}"
    if is_verifiable(row):
        problem = verified_problem(verified_question(row, SETTING), default_id, SETTING)
    else:
        problem = Problem(default_id, str(row.fields.get("question", "")), "")
    return Record(
        problem=problem,
        sample=integer(line, "sample"),
        completion=value_of_type(line, "text", str),
        trajectory=trajectory_from_json({"weights_version": 0, **line}),
    )
