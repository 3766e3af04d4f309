"""Turns of a conversation as files have them: under ShareGPT's names, in parts, with roles called otherwise."""

import json
from typing import Any

from dirl_cli.errors import DirlError

SHAREGPT = {"human": "user", "gpt": "assistant"}
ROLES = {**SHAREGPT, "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
TEMPLATE_ROLES = ("user", "assistant", "system", "tool")
TURN_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")  # that we or templates read


def read_turns(location: str, messages: Any) -> tuple[list[dict], list[str]]:
    """The turns of `messages`, each with role and content, both text; and what was read otherwise than written.

    location: where the messages stand, for an error. Raises DirlError that names the turn that cannot be read.
    """
    if not isinstance(messages, list):
        raise misshapen(location, messages)
    turns = []
    notes = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise misshapen(location, message)
        turn, turn_notes = read_turn(f"{location} turn {number}", message)
        turns.append(turn)
        notes += turn_notes
    return turns, list(dict.fromkeys(notes))


def read_turn(location: str, message: dict) -> tuple[dict, list[str]]:
    """One turn, as `read_turns` reads it, and its notes."""
    fields = {key: value for key, value in message.items() if value is not None}  # tables say null for what is absent
    notes = []

    # ShareGPT's names of the two keys.
    role = fields.pop("role", None)
    if role is None:
        role = fields.pop("from", None)
        if isinstance(role, str):
            role = SHAREGPT.get(role, role)
    content = fields.pop("content", fields.pop("value", None))

    if content is None and "tool_calls" in fields:
        content = ""
    if isinstance(content, list):
        content = join_text_parts(location, content)
        notes.append("the text parts of a turn are put together")
    is_text = isinstance(role, str) and isinstance(content, str)
    if not is_text or not isinstance(fields.get("reasoning_content", ""), str):
        raise misshapen(location, message)

    # A role that nobody knows stays as it is written: the chat template may know it.
    lower = role.lower()
    read_as = role
    if lower in ROLES:
        read_as = ROLES[lower]
    elif lower in TEMPLATE_ROLES:
        read_as = lower
    if read_as != role:
        notes.append(f"role {role} is read as {read_as}")
    for key in fields:
        if key not in TURN_KEYS:
            notes.append(f"`{key}` of a turn is only for a chat template to read")
    return {**fields, "role": read_as, "content": content}, notes


def join_text_parts(location: str, items: list) -> str:
    """The text of a turn that is written in parts. Raises DirlError for a part that is no text."""
    texts = []
    for item in items:
        text = item.get("text") if isinstance(item, dict) else None
        if not isinstance(text, str):
            kind = item.get("type") if isinstance(item, dict) else json.dumps(item, default=str)[:40]
            raise DirlError(f"{location} has a part of type {kind}, and only text is read: leave the row out")
        texts.append(text)
    return "".join(texts)


def says_something(turn: dict) -> bool:
    """Whether there is something in a turn: a text, or the call of a tool, whose text may be empty."""
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def misshapen(location: str, value: Any) -> DirlError:
    """The error for messages that are written otherwise. value: of them, what is wrong."""
    excerpt = json.dumps(value, default=str)[:60]
    return DirlError(f"{location}: messages must be a list of objects with role and content, both text, not {excerpt}")
