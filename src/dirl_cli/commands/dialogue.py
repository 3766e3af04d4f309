"""What is said in a chat and what is set: a conversation without a model, which lines typed by somebody move on."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import yaml

from dirl_cli.cli.build import build_settings
from dirl_cli.commands.prompts import read_messages
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.files import writing
from dirl_cli.ranges import format_value
from dirl_cli.text import counted
from dirl_cli.types import Decoding

FENCE = '"""'
PROMPT = "> "
CONTINUED = ". "  # the prompt of an entry's further lines
COMMANDS = {
    "/help": "these lines",
    "/system TEXT": "what stands before all turns; without TEXT nothing does",
    "/retry": "answer the last question again, with the next seed",
    "/set KEY=VALUE": "of decoding, such as threshold=0.8; alone it shows all",
    "/save FILE": "write the turns, as dirl generate messages=FILE reads them",
    "/load FILE": "go on with the turns of a file",
    "/clear": "begin anew; the system turn and what is set stay",
    "/quit": "end, as Ctrl-D does",
}
HELP = [
    *(f"{command:16} {meaning}" for command, meaning in COMMANDS.items()),
    f"A line that ends in \\ goes on in the next one. {FENCE} stands around several lines,",
    "or around a text that begins with /. Ctrl-C stops an answer and keeps what there",
    "is of it.",
]


@dataclass(frozen=True)
class Entry:
    """What somebody typed, one line or several. is_quoted: whether between fences, and so no command."""

    text: str
    is_quoted: bool = False


@dataclass(frozen=True)
class Consequence:
    """What follows from an entry. note: to show. asks: whether a question is to be answered. ends: whether to end."""

    note: str = ""
    asks: bool = False
    ends: bool = False


def read_entry(read_line: Callable[[str], str]) -> Entry:
    """The next entry. read_line: shows a prompt and reads a line; raises EOFError where none follows, as this does."""
    lines = [read_line(PROMPT)]
    is_quoted = lines[0].lstrip().startswith(FENCE)
    if is_quoted:
        lines[0] = lines[0].lstrip().removeprefix(FENCE)

    # Where the input ends before the entry does, what there is of it counts.
    try:
        while goes_on(lines[-1], is_quoted):
            lines.append(read_line(CONTINUED))
    except EOFError:
        lines.append("")
    if is_quoted:
        return Entry("\n".join(lines).rstrip().removesuffix(FENCE).strip("\n"), is_quoted)
    return Entry("\n".join(line.removesuffix("\\") for line in lines).strip())


def goes_on(line: str, is_quoted: bool) -> bool:
    """Whether an entry has a line after this one."""
    if is_quoted:
        return not line.rstrip().endswith(FENCE)
    return line.endswith("\\")


class Dialogue:
    """The turns so far, and how the next answer is decoded.

    require: raises DirlError for a decoding that the engine or the model lacks.
    """

    def __init__(self, decoding: Decoding, require: Callable[[Decoding], None]) -> None:
        self.decoding = decoding
        self.require = require
        self.messages: list[dict[str, str]] = []
        self.earlier: list[dict[str, str]] = []  # the turns before the last question was put
        self.own_files: set[Path] = set()  # that were saved or loaded, and so may be written again

    def receive(self, entry: Entry) -> Consequence:
        """Do what an entry says. Raises DirlError where it cannot be done, and then nothing has changed."""
        if not entry.text.strip():
            return Consequence()
        if entry.is_quoted or not entry.text.startswith("/"):
            self._put([*self.messages, {"role": "user", "content": entry.text}])
            return Consequence(asks=True)

        command, *rest = entry.text.split(maxsplit=1)
        argument = rest[0].strip() if rest else ""
        require_form(command, argument)
        match command:
            case "/system":
                return self._set_system(argument)
            case "/retry":
                return self._retry()
            case "/set":
                return self._set(argument)
            case "/save":
                return self._save(Path(argument).expanduser())
            case "/load":
                return self._load(Path(argument).expanduser())
            case "/clear":
                self.messages = self._system_turn()
                return Consequence("cleared")
            case "/quit":
                return Consequence(ends=True)
        return Consequence("\n".join(HELP))

    def answered(self, text: str) -> None:
        """Add the answer to the last question."""
        self.messages = [*self.messages, {"role": "assistant", "content": text}]

    def take_back(self) -> None:
        """Forget the last question, which has no answer; one that was asked again keeps the answer that it had."""
        self.messages = self.earlier

    def _put(self, messages: list[dict[str, str]]) -> None:
        """Put the last turn of `messages` as a question."""
        self.earlier = self.messages
        self.messages = messages

    def _system_turn(self) -> list[dict[str, str]]:
        return [turn for turn in self.messages[:1] if turn["role"] == "system"]

    def _set_system(self, text: str) -> Consequence:
        turns = self.messages[len(self._system_turn()) :]
        if not text:
            self.messages = turns
            return Consequence("no system turn")
        self.messages = [{"role": "system", "content": text}, *turns]
        return Consequence(f"system: {text}")

    def _retry(self) -> Consequence:
        is_answered = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        question = self.messages[:-1] if is_answered else self.messages
        if not question or question[-1]["role"] != "user":
            raise DirlError("there is no question to answer again: ask one first")
        if not is_answered:  # as a file may end
            self._put(question)
            return Consequence(asks=True)

        self.decoding = replace(self.decoding, seed=self.decoding.seed + 1)
        self._put(question)
        note = f"seed={self.decoding.seed}"
        if self.decoding.temperature == 0:
            note += ", which changes nothing at temperature=0: /set temperature=1"
        return Consequence(note, asks=True)

    def _set(self, assignment: str) -> Consequence:
        if not assignment:
            return Consequence("\n".join(format_field(self.decoding, field.name) for field in fields(Decoding)))
        key, equals, text = assignment.partition("=")
        if not equals:
            raise DirlError(f"/set {assignment}: give KEY=VALUE, such as threshold=0.8")

        # Plain text, which becomes a number or a list where the setting is one, as on the command line.
        try:
            value = yaml.load(text, yaml.BaseLoader)
        except yaml.YAMLError as error:
            raise DirlError(f"/set {assignment}: the value cannot be read, so write a list as [1, 2]") from error
        settings = asdict(self.decoding) | {key.strip(): None if value == "null" else value}
        decoding: Decoding = build_settings("decoding", settings, Decoding)
        self.require(decoding)
        self.decoding = decoding
        return Consequence(format_field(decoding, key.strip()))

    def _save(self, file: Path) -> Consequence:
        if not self.messages:
            raise DirlError("nothing has been said that could be saved: ask something first")
        if file.exists() and file.resolve() not in self.own_files:
            raise DirlError(f"{file} is there already: give a name that is free")
        with writing(file, "give another file"):
            file.write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self.own_files.add(file.resolve())
        return Consequence(f"{counted(len(self.messages), 'turn')} in {file}")

    def _load(self, file: Path) -> Consequence:
        self.messages = read_messages(file)
        self.own_files.add(file.resolve())
        note = f"{counted(len(self.messages), 'turn')} of {file}"
        if self.messages[-1]["role"] == "user":
            note += ", the last of them a question, which /retry answers"
        return Consequence(note)


def require_form(command: str, argument: str) -> None:
    """Raises DirlError for a command that is none, or that is given what it does not take."""
    forms = {form.split()[0]: form for form in COMMANDS}
    if command not in forms:
        hint = did_you_mean(command, forms)
        raise DirlError(f"{command}: no such command (a text that begins with / is written between {FENCE}); {hint}")
    takes_argument = forms[command] != command
    if argument and not takes_argument:
        raise DirlError(f"{command} stands alone: leave out {argument}")
    if not argument and forms[command].endswith("FILE"):
        raise DirlError(f"{command} wants a file: write {forms[command]}")


def format_field(decoding: Decoding, name: str) -> str:
    """A setting as `/set` is given it."""
    value = getattr(decoding, name)
    return f"{name}={format_value(list(value) if isinstance(value, tuple) else value)}"
