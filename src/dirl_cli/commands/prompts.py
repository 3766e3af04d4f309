"""The prompts that `dirl generate` completes: from the command line, standard input or a file, read and tokenized."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from dirl_cli.cli.build import build
from dirl_cli.data.chat import encode_messages, encode_prompt, encode_question
from dirl_cli.data.columns import text_field
from dirl_cli.data.conversation import read_turns
from dirl_cli.data.rows import Row, read_rows
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Instruction


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete, as tokens. fields: its line of the input, which the line of the output repeats."""

    prompt_ids: list[int]
    seed: int
    fields: dict[str, Any] = field(default_factory=dict)


def requested_rows(cfg: DictConfig) -> list[Row]:
    """The rows to complete: of the input file, or one from the command line or standard input.

    Raises DirlError where several are named, or none while somebody sits at a terminal.
    """
    named = [name for name in ("prompt", "messages", "input") if cfg[name] is not None]
    if len(named) > 1 or (not named and sys.stdin.isatty()):
        raise DirlError("give one of prompt=TEXT, messages=FILE and input=FILE.jsonl, or a prompt on standard input")
    if cfg.input is not None:
        return read_rows(cfg.input)
    if cfg.messages is not None:
        return [Row("the command line", {"messages": conversation(cfg.messages)})]
    prompt = cfg.prompt if named else "-"
    if prompt == "-":
        prompt = read_stdin("a prompt")
    return [Row("the command line", {"prompt": prompt})]


def conversation(messages: Any) -> Any:
    """The turns of a `messages` setting: a list, the text of one (JSON, or YAML in a line), a file of one, or - .

    Raises DirlError for what cannot be read as one.
    """
    if isinstance(messages, ListConfig):
        return OmegaConf.to_container(messages, resolve=True)
    is_text = messages.lstrip().startswith(("[", "{"))
    if is_text:
        source = "messages"
        content = messages
    elif messages == "-":
        source = "standard input"
        content = read_stdin("messages, a JSON list")
    else:
        source = messages
        content = read_text(Path(messages), f"messages={messages}")

    try:
        return json.loads(content)
    except ValueError as error:
        if not is_text:
            raise not_json(source, error) from error

    # What is typed by hand may be YAML.
    try:
        return yaml.load(content, yaml.BaseLoader)  # which takes every value for text
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise DirlError(
            f"messages is not a list that can be read ({reason}): give a JSON list, or messages=FILE"
        ) from error


def read_messages(file: Path) -> list[dict[str, str]]:
    """The turns of a file of messages. Raises DirlError where it cannot be read as such."""
    content = read_text(file, str(file))
    try:
        messages = json.loads(content)
    except ValueError as error:
        raise not_json(str(file), error) from error
    return messages_of(Row(str(file), {"messages": messages}))


def not_json(source: str, error: ValueError) -> DirlError:
    """The error for messages that are no JSON."""
    return DirlError(f"{source} is not valid JSON ({error}): give a list of objects with role and content")


def read_text(file: Path, name: str) -> str:
    """The text of a file of messages. name: what to call it. Raises DirlError where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DirlError(f"{name} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise DirlError(f"{file} is not UTF-8 text (byte {error.start}): convert it first") from error


def read_stdin(what: str) -> str:
    """All of standard input, without the line break at its end.

    what: is to come, said to somebody who types it. Raises DirlError where nothing comes.
    """
    if sys.stdin.isatty():
        print(f"type {what}, and Ctrl-D on a line of its own at the end", file=sys.stderr)
    try:
        content = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DirlError(f"standard input is not UTF-8 text (byte {error.start}): convert it first") from error
    if not content.strip():
        raise DirlError("nothing came on standard input: give prompt=TEXT, messages=FILE or input=FILE.jsonl")
    return content


def format_request(fields: dict[str, Any]) -> str:
    """A row of the command line as text, to show how it was understood."""
    if "messages" not in fields:
        return f"prompt: {fields['prompt']}"
    turns, _ = read_turns("the command line", fields["messages"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def encode_rows(cfg: DictConfig, lm: DiffusionLM, rows: list[Row]) -> list[Prompt]:
    """The prompts of the rows. Raises DirlError that names a row whose prompt is missing, malformed or too long."""
    instruction = build(cfg.instruction, Instruction)
    prompts = []
    for row in rows:
        seed = row.fields.get("seed", cfg.decoding.seed)
        if type(seed) is not int:
            raise DirlError(f"{row.location}: seed must be a whole number, not {seed}")
        prompt_ids = encode_row(lm, row, instruction)
        if len(prompt_ids) > lm.longest_prompt:
            lengths = f"{len(prompt_ids)} tokens and the model has room for {lm.longest_prompt}"
            raise DirlError(f"the prompt of {row.location} has {lengths}: shorten it or leave it out")
        prompts.append(Prompt(prompt_ids, seed, row.fields))
    return prompts


def encode_row(lm: DiffusionLM, row: Row, instruction: Instruction) -> list[int]:
    """The prompt tokens of a row: of its prompt_ids, prompt (text), messages, or question (with the instruction)."""
    fields = row.fields
    if "prompt_ids" in fields:
        ids = fields["prompt_ids"]
        vocabulary = lm.model.config.vocab_size
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
            raise DirlError(f"{row.location}: prompt_ids must be a list of token ids below {vocabulary}")
        return ids

    # Of several fields the most literal one counts: a text as it stands, then turns, then a question.
    tokenizer = lm.require_tokenizer()
    if "prompt" in fields:
        return encode_prompt(tokenizer, text_field(row, "prompt", ""))
    if "messages" in fields:
        return encode_messages(tokenizer, messages_of(row))
    if "question" in fields:
        return encode_question(tokenizer, text_field(row, "question", ""), instruction)
    raise DirlError(f"{row.location} has no prompt: give question, prompt, messages or prompt_ids")


def messages_of(row: Row) -> list[dict[str, str]]:
    """The turns of a row's messages. Raises DirlError where there is none."""
    messages, _ = read_turns(row.location, row.fields["messages"])
    if not messages:
        raise DirlError(f"{row.location}: messages must be a list of objects with role and content, at least one")
    return messages
