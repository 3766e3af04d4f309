"""Turns of a conversation as files have them: under ShareGPT's names, in parts, with roles called otherwise."""

import json
from typing import Any

from dirl_cli.errors import DirlError

SHAREGPT = {"human": "user", "gpt": "assistant"}
ROLES = {**SHAREGPT, "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
KNOWN = ("user", "assistant", "system", "tool")
READ = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")  # by us or by chat templates


def read_turns(place: str, messages: Any) -> tuple[list[dict], list[str]]:
    """The turns of `messages`, each with role and content, both text; and what was read otherwise than written.

    Raises DirlError that names the turn that cannot be read.
    """
    if not isinstance(messages, list):
        raise misshapen(place, messages)
    turns, notes = [], []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise misshapen(place, message)
        turn, said = read_turn(f"{place} turn {number}", message)
        turns.append(turn)
        notes += said
    return turns, list(dict.fromkeys(notes))


def read_turn(place: str, message: dict) -> tuple[dict, list[str]]:
    """One turn; tables say null for what it does not have."""
    given = {key: value for key, value in message.items() if value is not None}
    notes = []
    role = given.pop("role", None)
    if role is None and isinstance(role := given.pop("from", None), str):
        role = SHAREGPT.get(role, role)
    content = given.pop("content", given.pop("value", None))
    if content is None and "tool_calls" in given:
        content = ""
    if isinstance(content, list):
        content = join_text_parts(place, content)
        notes.append("the text parts of a turn are put together")
    if not isinstance(role, str) or not isinstance(content, str):
        raise misshapen(place, message)
    if not isinstance(given.get("reasoning_content", ""), str):
        raise misshapen(place, message)

    lower = role.lower()
    ours = ROLES.get(lower, lower if lower in KNOWN else role)
    if ours != role:
        notes.append(f"role {role} is read as {ours}")
    notes += [f"`{key}` of a turn is only for a chat template to read" for key in given if key not in READ]
    return {**given, "role": ours, "content": content}, notes


def join_text_parts(place: str, parts: list) -> str:
    """The text of the parts of a turn. Raises DirlError for any other part."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else json.dumps(part, default=str)[:40]
            raise DirlError(f"{place} has a part of type {kind}, and only text is read: leave the row out")
        texts.append(text)
    return "".join(texts)


def misshapen(place: str, given: Any) -> DirlError:
    shown = json.dumps(given, default=str)[:60]
    return DirlError(f"{place}: messages must be a list of objects with role and content, both text, not {shown}")
