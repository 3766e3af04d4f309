"""What the configuration tree holds, for the site's reference: keys with their types, defaults and explanations.

A key is explained by the comment at its line of a file in conf/, or else in the docstring of the dataclass behind it.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dirl_cli.cli import config_tree
from dirl_cli.cli.build import find_class
from dirl_cli.cli.departures import own_values as read_own_values
from dirl_cli.cli.schema import SCHEMAS
from dirl_cli.files import conf_dir
from dirl_cli.ranges import describe_type, type_at, without_none
from dirl_cli.types import Decoding, Instruction

NO_SETTINGS = ("defaults", "each")  # but what files say of others
CLASSES = {"decoding": Decoding, "instruction": Instruction}  # of groups that name no _target_
KEY = re.compile(r"( *)(\w+):(?: +(?P<value>[^#].*?))??(?: +# +(?P<comment>.*))?$")
COMMENT = re.compile(r"( *)# +(.*)$")


own_values = cache(read_own_values)  # of which each is asked for often


@dataclass(frozen=True)
class Setting:
    """A key of one file or command.

    values: what it may be, in words, "" where its type does not say. default: as YAML has it. line: what it does.
    """

    key: str
    values: str
    default: Any
    line: str


def command_settings(command: str) -> list[Setting]:
    """The keys of a command outside its groups, as they are where a model is given and no preset is chosen."""
    cfg: Any = OmegaConf.create({})
    lines: dict[str, str] = {}
    for file in chain(conf_dir() / f"{command}.yaml"):
        cfg = OmegaConf.merge(cfg, OmegaConf.load(file))
        lines |= explanations(file.read_text())
    values = OmegaConf.to_container(cfg)
    for name in ("defaults", "hydra"):
        values.pop(name, None)

    kind = SCHEMAS[command]
    settings = []
    for key, default in config_tree.leaves(values):
        if group_of(key) is None:
            settings.append(Setting(key, in_words(type_at(kind, key)), default, lines.get(key, "")))
    return settings


def set_of_groups(command: str) -> dict[str, Any]:
    """What the file of a command says of its groups' keys, whatever is chosen."""
    values: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{command}.yaml"))
    values.pop("defaults")
    return {key: value for key, value in config_tree.leaves(values) if group_of(key)}


def chosen_groups(command: str) -> dict[str, str | None]:
    """The groups of a command with what is chosen of each by default; None where that is left to the user."""
    chosen: dict[str, str | None] = {}
    for file in chain(conf_dir() / f"{command}.yaml"):
        config: Any = OmegaConf.to_container(OmegaConf.load(file))
        for entry in config.get("defaults", []):
            if isinstance(entry, dict):
                [(group, choice)] = entry.items()
                if (conf_dir() / group).is_dir():
                    chosen[group] = None if choice in ("???", None) else choice
    return chosen


def chain(file: Path) -> list[Path]:
    """A config behind the files beside it that its defaults name, the first of them first."""
    config: Any = OmegaConf.to_container(OmegaConf.load(file))
    names = [entry for entry in config.get("defaults", []) if isinstance(entry, str)]
    bases = [file.with_stem(name) for name in names if file.with_stem(name).exists()]
    return [*(each for base in bases for each in chain(base)), file]


def group_of(key: str) -> str | None:
    """The config group that a key belongs to, if any."""
    first = key.partition(".")[0]
    return first if "." in key and (conf_dir() / first).is_dir() else None


def groups() -> list[str]:
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "experiment")


def group_settings(group: str) -> dict[str, list[Setting]]:
    """By the name of each choice of a group, its keys."""
    files = sorted((conf_dir() / group).glob("*.yaml"))
    values = {file.stem: own_values(file) for file in files}
    lines = {file.stem: lines_of(file) for file in files}
    common = {key: line for file in (conf_dir() / group).glob("*/*.yaml") for key, line in lines_of(file).items()}

    settings = {}
    for file in files:
        own = values[file.stem]
        kind = kind_of(group, own)
        bases = [lines[base.stem] for base in reversed(chain(file))]
        alike = [lines[name] for name in values if values[name].get("_target_") == own.get("_target_")]
        settings[file.stem] = []
        for key, default in config_tree.leaves(own):
            if key in NO_SETTINGS or key.startswith("published.") or key.endswith("_target_"):
                continue
            line = explained(key, [*bases, common]) or documented(kind, own, key) or explained(key, alike)
            settings[file.stem].append(Setting(key, in_words(type_in(kind, own, key)), default, line))
    return settings


def explained(key: str, sources: Sequence[Mapping[str, str]]) -> str:
    """The first line that there is of a key."""
    return next((lines[key] for lines in sources if key in lines), "")


def target_of(group: str, choice: str) -> str:
    """The import path of the class behind a choice, "" where there is none."""
    return str(own_values(conf_dir() / group / f"{choice}.yaml").get("_target_", ""))


def kind_of(group: str, values: Mapping[str, Any]) -> Any:
    """The dataclass behind a choice."""
    if "_target_" in values:
        return find_class(values["_target_"], group)
    return CLASSES.get(group)


def type_in(kind: Any, values: Mapping[str, Any], key: str) -> Any:
    """The type of a key, which may be of an object inside the choice's own, such as views.draws."""
    first, _, rest = key.partition(".")
    inner = values.get(first)
    if rest and isinstance(inner, dict) and "_target_" in inner:
        return type_at(find_class(inner["_target_"], first), rest)
    return type_at(kind, key) if kind else None


def in_words(hint: Any) -> str:
    if hint is None or without_none(hint) is Any:
        return ""
    return describe_type(hint)


def lines_of(file: Path) -> dict[str, str]:
    """What the comments of a choice's file say of the group's own keys."""
    text = file.read_text()
    lines = explanations(text)
    if text.startswith("# @package _global_"):
        group = f"{file.parent.name}."
        lines = {key.removeprefix(group): line for key, line in lines.items() if key.startswith(group)}
    return lines


def explanations(text: str) -> dict[str, str]:
    """By the full key of each line of a config that has one, its comment, or the comment above it.

    A comment goes on in the lines below that have nothing else and are indented more than the key. What a file begins
    with is of the file.
    """
    text = re.sub(r"\A(#.*\n)+", "", text)
    lines: dict[str, str] = {}
    path: list[tuple[int, str]] = []  # the keys that a line is inside, with their indents
    above: list[str] = []
    current = ""
    for row in text.splitlines():
        if match := COMMENT.match(row):
            indent, comment = len(match[1]), match[2]
            if current and not above and indent > path[-1][0] + 2:
                lines[current] += f" {comment}"
            else:
                above.append(comment)
                current = ""
            continue

        match = KEY.match(row)
        if match:
            indent = len(match[1])
            path = [(depth, key) for depth, key in path if depth < indent] + [(indent, match[2])]
            key = ".".join(name for _, name in path)
            line = " ".join([*above, match["comment"] or ""]).strip()
            if line:
                lines[key] = line
            current = key if match["comment"] else ""
        above = []
    return lines


def documented(kind: Any, values: Mapping[str, Any], key: str) -> str:
    """What the docstring of the dataclass behind a key says of it."""
    first, _, rest = key.partition(".")
    inner = values.get(first)
    if rest and isinstance(inner, dict) and "_target_" in inner:
        return of_docstring(find_class(inner["_target_"], first), rest)
    return of_docstring(kind, first) if kind else ""


def of_docstring(kind: Any, name: str) -> str:
    """The words after `name:` in a docstring, else the first sentence that has the name; "" where there is none."""
    promise = []
    known = "|".join(field.name for field in fields(kind))
    for paragraph in re.split(r"\n\s*\n", inspect.getdoc(kind) or ""):
        parts = re.split(rf"(?:^|(?<=[.;:]\s)|(?<=\n))((?:{known})(?:, (?:{known}))*): ", paragraph)
        for names, words in zip(parts[1::2], parts[2::2], strict=True):
            if name in names.split(", "):
                return " ".join(words.split()).rstrip(".")
        promise += parts[0].split()
    sentences = re.split(r"(?<=[.;]) ", " ".join(promise))
    return next((sentence.rstrip(".;") for sentence in sentences if re.search(rf"\b{name}\b", sentence)), "")
