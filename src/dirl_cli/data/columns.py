"""What a row means: its columns under our names, as a demonstration or as a problem."""

import json
from collections.abc import Mapping
from typing import Any

from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.types import Problem

COLUMNS = ("messages", "role", "content", "prompt", "response", "question", "ground_truth_answer", "id", "subset")
SPEAKERS = {"human": "user", "gpt": "assistant"}  # what ShareGPT calls them


def renamed(rows: list[Row], columns: Mapping[str, str]) -> list[Row]:
    """The rows with their columns under our names."""
    for ours in columns:
        if ours not in COLUMNS:
            raise DirlError(f"columns={{{ours}: {columns[ours]}}}: {did_you_mean(ours, COLUMNS)}")
    return [Row(row.place, rename(row.fields, columns)) for row in rows]


def rename(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    given = {name: value for name, value in fields.items() if value is not None}  # tables say null for what is absent
    named = {name: value for name, value in given.items() if name not in columns}
    named |= {ours: given[theirs] for ours, theirs in columns.items() if theirs in given}
    if isinstance(named.get("messages"), list):
        named["messages"] = [rename(one, columns) if isinstance(one, dict) else one for one in named["messages"]]
    if "role" in named:
        named["role"] = SPEAKERS.get(str(named["role"]), named["role"])
    return named


def demonstration(row: Row) -> dict:
    """What of a row is learned from: its messages, its prompt and response, or its question and response.

    Of these the first that it has. Prompt and response are taken as written; a question is put to the model as
    elsewhere, through the chat template and with the instruction.
    """
    if "messages" not in row.fields:
        asked = "prompt" if "prompt" in row.fields else "question"
        expected = "a demonstration has messages, prompt and response, or question and response"
        return {key: text(row, key, expected) for key in (asked, "response")}
    messages = row.fields["messages"]
    good = isinstance(messages, list) and all(map(is_message, messages))
    if not good or all(message["role"] != "assistant" for message in messages):
        raise DirlError(
            f"{row.place}: messages must be a list of objects with role and content, one of them the assistant's"
        )
    return {"messages": messages}


def is_message(given: Any) -> bool:
    """Whether this is a turn of a conversation: text by text, with a thought before it or without."""
    if not isinstance(given, dict):
        return False
    texts = [given.get("role"), given.get("content"), given.get("reasoning_content") or ""]
    return all(isinstance(text, str) for text in texts)


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
        hint = f"; map yours ({', '.join(row.fields)}) with columns={{{key}: …}}"
        raise DirlError(f"{row.place} has no {key}: {expected}{hint if row.fields else ''}")
    value = row.fields[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DirlError(f"{row.place}: {key} must be text, not {json.dumps(value, default=str)[:40]}")
    return str(value)
