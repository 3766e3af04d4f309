"""The words of a command line before Hydra reads them: paths in the place of group choices, and mistyped choices."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from dirl_cli.errors import DirlError, did_you_mean

PATH_CHOICE = {"data": "file", "bench": "file", "model": "path"}  # the choice whose `path` takes any path
LONGEST_KEY = 200  # characters; a file name, as Hydra looks for, may have few more
DATA_SUFFIXES = (".json", ".jsonl", ".parquet")


def rewrite(words: Sequence[str], choices: Callable[[str], list[str]], sweep: bool) -> list[str]:
    """Spell `data=FILE` as `data=file data.path='FILE'`, likewise bench and model, and check every group's choice.

    Paths in a list, as in `compare=[A,B]`, are put in Hydra's quotes.

    choices: what a group offers, nothing for a key that is no group. sweep: whether commas separate values.
    """
    if strange := [word for word in words if len(word.partition("=")[0]) > LONGEST_KEY]:
        raise DirlError(f"{strange[0][:40]}…: no key is that long; an override has the form KEY=VALUE")
    return [new for word in words for new in rewrite_word(word, choices, sweep)]


def spell_out(words: Sequence[str], each: Callable[[str], list[str]]) -> list[str]:
    """Spell `bench=all` as the choices that it stands for: `each` of a group."""
    members = {word: each(word.removesuffix("=all")) for word in words if word.endswith("=all")}
    return [f"{word[:-3]}{','.join(members[word])}" if members.get(word) else word for word in words]


def gather(words: Sequence[str], key: str) -> list[str]:
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


def rewrite_word(word: str, choices: Callable[[str], list[str]], sweep: bool) -> list[str]:
    group, equals, value = word.partition("=")
    if paths := re.fullmatch(r"\[([^'\"\[\]{}]+/[^'\"\[\]{}]+)\]", value):
        return [f"{group}=[{','.join(quote(path) for path in paths[1].split(','))}]"]
    if not (equals and value and re.fullmatch(r"[\w/]+", group)) or value[0] in "[{$" or value == "null":
        return [word]
    known = choices(group)
    commas = sweep or all(part in known for part in value.split(","))  # without -m, Hydra says what a comma needs
    values = value.split(",") if commas and not exists(Path(value)) else [value]
    strange = [value for value in values if value not in known]
    if not known or not strange or re.fullmatch(r"\w+\(.*\)", value):  # Hydra's functions, such as choice(a,b)
        return [word]
    if group not in PATH_CHOICE or not all(looks_like_path(value) for value in strange):
        path = ["a path"] if group in PATH_CHOICE else []
        raise DirlError(f"{group}={strange[0]}: {did_you_mean(strange[0], [*known, *path])}")
    if len(strange) < len(values):
        raise DirlError(f"{word} mixes names and paths: sweep over the names, then over the paths")
    return [f"{group}={PATH_CHOICE[group]}", f"{group}.path={','.join(quote(path) for path in values)}"]


def looks_like_path(value: str) -> bool:
    return "/" in value or value.endswith(DATA_SUFFIXES) or exists(unquote(value))


def exists(path: Path) -> bool:
    """Whether there is such a file; what is longer than a name may be is not one."""
    try:
        return path.exists()
    except OSError:
        return False


def unquote(value: str) -> Path:
    """The path a user meant, `~` and the quotes that Hydra needs around odd characters included."""
    quoted = re.fullmatch(r"""(['"])(.*)\1""", value)
    return Path(quoted[2] if quoted else value).expanduser()


def quote(value: str) -> str:
    """A path in Hydra's quotes, whatever characters it holds."""
    return QuotedString(str(unquote(value)).replace("${", "\\${"), Quote.single).with_quotes()


def fixed_keys(words: Sequence[str]) -> list[str]:
    """The keys that have the same value in every job of a sweep."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(words))
    except HydraException:
        return []  # Hydra tells what is wrong with it
    return [override.get_key_element() for override in parsed if not override.is_sweep_override()]
