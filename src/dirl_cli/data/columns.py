"""The columns of a row under our names, and what of them is text, is empty, or is not read.

What is read otherwise than written goes with the row as a note, and so do the columns that nothing is made of.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from math import isnan
from typing import Any

from dirl_cli.data.code_rows import CODE
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.text import counted

TURNS = ("messages", "role", "content")
PAIR = ("chosen", "rejected")
TEXTS = ("system", "prompt", "response", "question", "ground_truth_answer", *PAIR)
COLUMNS = (*TURNS, *TEXTS, *CODE, "id", "subset")
ANSWERS = ("response", "ground_truth_answer", *PAIR)  # a row without one is left out, and counted
# Columns that say where a row comes from or of which kind it is; a nameless one is a table's count of its rows.
LABELS = {"", "id", "idx", "index", "uuid", "source", "data_source", "dataset", "url", "split", "subset", "level"}
EMPTY: tuple[Any, ...] = ("", [], {}, None)  # what says nothing
LONGEST_EXPONENT = 50  # of a number that is spelled out
SHOWN = 60  # characters of an example
VERIFYING = ("verifier", "options", "aliases", "details")  # how a row is graded (data/verified_rows.py)


def rename_columns(rows: list[Row], columns: Mapping[str, str], setting: str = "data.columns=") -> list[Row]:
    """The rows with their columns under our names.

    columns: the file's name of each, by ours. setting: how a user gives `columns`, for a sentence.
    Raises DirlError for a name that is none of ours.
    """
    for ours, theirs in columns.items():
        if ours not in (*COLUMNS, *VERIFYING):
            raise DirlError(f"{setting}{{{ours}: {theirs}}}: {did_you_mean(ours, (*COLUMNS, *VERIFYING))}")
    renamed = [rename_row(row, columns) for row in rows]
    if columns.get("question") == "instruction":  # Alpaca's rows, whose `input` belongs to the question
        renamed = [append_input(row, "question") for row in renamed]
    return renamed


def rename_row(row: Row, columns: Mapping[str, str]) -> Row:
    """The row, and the turns of its messages, with the columns under our names."""
    fields = rename_fields(row.fields, columns)
    overwritten = overwritten_columns(row.fields, columns)

    # `role` and `content` are columns of a turn, wherever the turns stand.
    for name in ("messages", "prompt", "question", *PAIR):
        turns = fields.get(name)
        if not isinstance(turns, list):
            continue
        fields[name] = list(turns)  # the row keeps its own
        for i, turn in enumerate(turns):
            if isinstance(turn, dict):
                overwritten += overwritten_columns(turn, columns)
                fields[name][i] = rename_fields(turn, columns)

    notes = list(row.notes)
    for name in dict.fromkeys(overwritten):  # once, though all turns may have it
        notes.append(f"`{columns[name]}` is taken for `{name}`, and its own `{name}` is not read")
    return row._replace(fields=fields, notes=tuple(notes))


def rename_fields(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields with those that `columns` names under our names, the others as they are."""
    mapped = {*columns, *columns.values()}
    renamed = {name: field for name, field in fields.items() if name not in mapped}
    for ours, theirs in columns.items():
        if theirs in fields:
            renamed[ours] = fields[theirs]
    return renamed


def overwritten_columns(fields: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Our names under which the fields hold something already, which another column replaces."""
    overwritten = []
    for ours, theirs in columns.items():
        is_read_as_another = ours in columns.values()
        if not is_read_as_another and fields.get(ours) not in EMPTY and theirs in fields:
            overwritten.append(ours)
    return overwritten


def append_input(row: Row, question: str) -> Row:
    """The row with Alpaca's `input`, where there is one, on the line below its question.

    question: the name of the column that holds it.
    """
    fields = dict(row.fields)
    instruction = fields.get(question)
    alpaca_input = fields.get("input")
    if not (isinstance(alpaca_input, str) and alpaca_input.strip() and isinstance(instruction, str)):
        return row
    del fields["input"]
    fields[question] = f"{instruction}\n{alpaca_input}"
    return Row(row.location, fields, (*row.notes, "`input` stands on the line below the question"))


def text_field(row: Row, key: str, expected: str, setting: str = "data.columns=") -> str:
    """The field as text, a number by its digits; an answer that is null is "".

    expected: what a row should have, for the error. setting: how a user gives `columns`.
    Raises DirlError where it is missing or neither text nor a number.
    """
    if key not in row.fields:
        sentence = f"{row.location} has no {key}: {expected}"
        if columns := ", ".join(row.fields):
            sentence += f"; map yours ({columns}) with '{setting}{{{key}: …}}'"
        raise DirlError(sentence)

    field = row.fields[key]
    if field is None and key in ANSWERS:
        return ""
    if isinstance(field, bool) or not isinstance(field, str | int | float | Decimal):
        raise DirlError(f"{row.location}: {key} must be text, not {json.dumps(field, default=str)[:40]}")
    return spelled_out(field)


def spelled_out(number: str | int | float | Decimal) -> str:
    """A number by its digits, 0.00001 and not 1e-05; text as it is."""
    spelling = str(number)
    if isinstance(number, float | Decimal) and "e" in spelling.lower():
        exact = Decimal(spelling)
        return f"{exact:f}" if abs(exact.adjusted()) <= LONGEST_EXPONENT else spelling
    return spelling


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that hold nothing: tables say null or NaN for what is absent. Answers stay, as null."""
    present: dict[str, Any] = {}
    for name, field in fields.items():
        is_null = field is None or (isinstance(field, float) and isnan(field))
        if not is_null:
            present[name] = field
        elif name in (*ANSWERS, "answer", "output"):
            present[name] = None
    return present


def with_note(row: Row, fields: dict[str, Any], note: str) -> Row:
    """The row with other fields, and a note of how they were read."""
    return row._replace(fields=fields, notes=(*row.notes, note))


def unread_columns(row: Row, read: set[str]) -> dict[str, Any]:
    """The columns that say something and of which nothing is made. read: those that are used."""
    unread = {}
    for name, field in row.fields.items():
        if name not in read and name not in LABELS and field not in EMPTY:
            unread[name] = field
    return unread


def summarize_notes(rows: Iterable[Row]) -> list[str]:
    """A line for each kind of note, with how many rows it is about and the first of them; one for what is not read."""
    note_counts = Counter[str]()
    first_locations = dict[str, str]()  # of each note
    unread_counts = Counter[str]()
    example = ""
    for row in rows:
        for note in row.notes:
            note_counts[note] += 1
            first_locations.setdefault(note, row.location)
        for name, field in row.unread.items():
            unread_counts[name] += 1
            if not example:
                excerpt = json.dumps(field, default=str, ensure_ascii=False)[:SHOWN]
                example = f"{row.location} has {name}: {excerpt}"

    lines = [f"{counted(count, 'row')}: {note} (first {first_locations[note]})" for note, count in note_counts.items()]
    if unread_counts:
        unread = [f"{name} ({counted(count, 'row')})" for name, count in unread_counts.items()]
        lines.append(f"not read: {', '.join(unread)}; {example}")
    return lines
