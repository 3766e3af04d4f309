"""The words of a command line before Hydra reads them.

Hydra has a grammar for values, in which commas, quotes, `=` and letters outside ASCII mean something. Texts and paths
know nothing of it: the values of `TEXTS` and `PATHS`, and paths in the place of group choices, are taken as they are.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from dirl_cli.errors import DirlError, did_you_mean, pip_install
from dirl_cli.text import literal, shell_word

PATH_CHOICE = {"data": "file", "bench": "file", "model": "path"}  # the choice whose `path` takes any path
TEXTS = ("prompt", "messages", "instruction.text")  # their whole value, also with -m
PATHS = ("adapter", "compare", "input", "name", "out", "path", "predictions", "replay", "resume", "to")  # last parts
MAPPINGS = ("options", "weights")  # whose keys are the user's: one that is given takes the other's place
MOST_COMMAS = 20  # that are looked for in the name of a path
LONGEST_KEY = 200  # characters; a file name, as Hydra looks for, may have few more
DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv")


def rewrite(words: Sequence[str], choices: Callable[[str], list[str]], sweep: bool) -> list[str]:
    """Put texts and paths in Hydra's quotes, spell `data=FILE` as `data=file data.path='FILE'`, check group choices.

    choices: what a group offers, nothing for a key that is no group. sweep: whether commas separate values.
    """
    if strange := [word for word in words if len(word.partition("=")[0]) > LONGEST_KEY]:
        raise DirlError(f"{strange[0][:40]}…: no key is that long; an override has the form KEY=VALUE")
    if nameless := [word for word in words if word.startswith("=")]:
        raise DirlError(f"{nameless[0]}: an override has the form KEY=VALUE, without spaces")
    return [new for word in words for new in rewrite_word(word, choices, sweep)]


def expand_all(words: Sequence[str], each: Callable[[str], list[str]]) -> list[str]:
    """Spell `bench=all` as the choices that it stands for: `each` of a group."""
    members = {word: each(word.removesuffix("=all")) for word in words if word.endswith("=all")}
    return [f"{word[:-3]}{','.join(members[word])}" if members.get(word) else word for word in words]


def collect_bare_words(words: Sequence[str], key: str) -> list[str]:
    """Spell the words that are no overrides as one list, the value of `key`."""
    bare = [word for word in words if "=" not in word and not word.startswith("~")]
    others = [word for word in words if word not in bare]
    quoted = [QuotedString(word, Quote.single).with_quotes() for word in bare]
    return [*others, f"{key}=[{','.join(quoted)}]"] if bare else others


def choose_files(words: Sequence[str], has: Callable[[str], bool]) -> list[str]:
    """Put `bench=file` before a `bench.path=FILE` that finds no place in the default choice; `has` knows the keys."""
    given = {word.partition("=")[0] for word in words}
    alone = [group for group in PATH_CHOICE if f"{group}.path" in given and group not in given]
    lost = [group for group in alone if not has(f"{group}.path")]
    return [*(f"{group}={PATH_CHOICE[group]}" for group in lost), *words]


def drop_preset(words: Sequence[str], preset: str | None) -> list[str]:
    """Put `~experiment` beside a chosen model: a preset tells how its own model is trained, and no other.

    preset: the experiment that the command runs by default, if any.
    """
    given = {word.partition("=")[0] for word in words}
    if preset and given & {"model", "model.path"} and not given & {"experiment", "~experiment"}:
        return ["~experiment", *words]
    return list(words)


def rewrite_word(word: str, choices: Callable[[str], list[str]], sweep: bool) -> list[str]:
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if equals and name in TEXTS:
        return [f"{key}={quote(value)}"]
    if equals and value in ("", "null") and (known := choices(name)):
        path = ["a path"] if name in PATH_CHOICE else []
        raise DirlError(f"{word} names nothing: choose one of {', '.join([*known, *path])}")
    if not value or value == "null" or is_call(value):
        return [word]
    if name.rpartition(".")[2] in MAPPINGS and value[0] == "{" and key == name:
        return [f"~{key}", f"+{key}={value}"]
    if name.rpartition(".")[2] == "columns" and value[0] == "{":
        return [f"+{name}={value}"]  # beside those that a benchmark of ours has, if any
    if name.rpartition(".")[2] in PATHS:
        return [f"{key}={quote_paths(value, sweep)}"]
    return rewrite_choice(word, choices, sweep) if re.fullmatch(r"[\w/]+", key) else [word]


def rewrite_choice(word: str, choices: Callable[[str], list[str]], sweep: bool) -> list[str]:
    """Spell GROUP=PATH as Hydra's choice of the group that takes a path. Raises DirlError for a choice there is not."""
    group, _, value = word.partition("=")
    known = choices(group)
    if not known or value[0] in "{$":
        return [word]
    if value[0] == "[":
        raise DirlError(f"{word}: {one_at_a_time(group, split_paths(value[1:-1]))}")
    commas = sweep or all(part in known for part in value.split(","))  # without -m, Hydra says what a comma needs
    values = split_paths(value) if commas else [value]
    strange = [value for value in values if value not in known]
    if not strange:
        return [word]
    if group == "hydra/launcher":
        raise DirlError(f"{word} is in no package that is installed: {pip_install('launchers')}")
    if group not in PATH_CHOICE or not all(looks_like_path(value) for value in strange):
        path = ["a path"] if group in PATH_CHOICE else []
        raise DirlError(f"{group}={strange[0]}: {did_you_mean(strange[0], [*known, *path])}")
    if len(strange) < len(values):
        raise DirlError(f"{word} mixes names and paths: sweep over the names, then over the paths")
    return [f"{group}={PATH_CHOICE[group]}", f"{group}.path={','.join(quote(unquote(path)) for path in values)}"]


def one_at_a_time(group: str, values: Sequence[str]) -> str:
    """What to write in the place of a list of a group's choices."""
    if group == "data":
        names = [QuotedString(value.strip(), Quote.double).with_quotes() for value in values]
        sources = ", ".join(f"{{path: {name}}}" for name in names)
        return f"several files are a mixture: data=mix {shell_word('data.sources', f'[{sources}]')}"
    return f"{group} is one at a time: `-m {shell_word(group, ','.join(value.strip() for value in values))}` runs each"


def is_call(value: str) -> bool:
    """Whether this is one of Hydra's functions, such as choice(a,b)."""
    return re.fullmatch(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", value) is not None


def quote_paths(value: str, sweep: bool) -> str:
    """A path in Hydra's quotes; each of several, in a list as in `compare=[A,B]` or where -m goes through them."""
    in_list = re.fullmatch(r"\[(.*)\]", value)
    if in_list and not exists(value):
        return f"[{','.join(quote_path(path) for path in split_paths(in_list[1]))}]"
    return ",".join(quote_path(path) for path in (split_paths(value) if sweep else [value]))


def split_paths(text: str) -> list[str]:
    """The paths between commas; a comma in the name of one that exists separates nothing."""
    parts, paths = text.split(","), []
    while parts:
        heads = [",".join(parts[:end]) for end in range(1, min(len(parts), MOST_COMMAS) + 1)]
        end = max((i for i, head in enumerate(heads, 1) if exists(head)), default=1)
        paths.append(heads[end - 1])
        parts = parts[end:]
    return paths


def looks_like_path(value: str) -> bool:
    return "/" in value or value.endswith(DATA_SUFFIXES) or exists(value)


def exists(value: str) -> bool:
    """Whether there is such a file; what is longer than a name may be is not one."""
    try:
        return Path(unquote(value)).exists()
    except (OSError, ValueError):
        return False


def unquote(value: str) -> str:
    """The path a user meant, `~` and the quotes that Hydra needs around odd characters included."""
    quoted = re.fullmatch(r"""(['"])(.*)\1""", value)
    return str(Path(os.path.expanduser(quoted[2] if quoted else value)))


def quote(text: str) -> str:
    """A text in Hydra's quotes, whatever characters it holds."""
    return QuotedString(literal(text), Quote.single).with_quotes()


def quote_path(value: str) -> str:
    """A path in Hydra's quotes. `${…}` in it is what the config says, unless it is part of an existing path's name."""
    path = unquote(value)
    return quote(path) if exists(value) else QuotedString(path, Quote.single).with_quotes()


def fixed_keys(words: Sequence[str]) -> list[str]:
    """The keys that have the same value in every job of a sweep."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(words))
    except HydraException:
        return []  # Hydra tells what is wrong with it
    return [override.get_key_element() for override in parsed if not override.is_sweep_override()]
