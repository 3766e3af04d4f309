"""The words of a command line before Hydra reads them.

Hydra has a grammar for values, in which commas, quotes, `=` and letters outside ASCII mean something. Texts and paths
know nothing of it: the values of `TEXTS` and `PATHS`, and paths in the place of group choices, are taken as they are.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from dirl_cli.errors import DirlError, UnknownChoice, did_you_mean, pip_install
from dirl_cli.line_files import lines_of, step_files, step_of
from dirl_cli.text import literal, shell_word

PATH_CHOICE = {"data": "file", "bench": "file", "model": "path"}  # the choice whose `path` takes any path
COMPLETIONS = "completions.jsonl"  # beside the files of steps, what data=rollouts reads
TEXTS = ("prompt", "messages", "instruction.text", "algo.teacher_prompt")  # their whole value, also with -m
# Last parts of the keys whose values are paths.
PATHS = (
    "adapter",
    "answers",
    "compare",
    "export",
    "input",
    "name",
    "out",
    "pairs_from",
    "path",
    "predictions",
    "replay",
    "resume",
    "tasks_from",
    "teacher",
    "to",
)
MAPPINGS = ("options", "weights")  # whose keys are the user's: a new mapping replaces the old one
MOST_COMMAS = 20  # in the name of a path; a longer list is taken for separate paths
MANY_CHOICES = 8  # more are told with a line each, where none is like the one that was typed
LONGEST_KEY = 200  # characters; a file name, as Hydra looks for, may have few more
DATA_SUFFIXES = (".json", ".jsonl", ".gz", ".parquet", ".csv", ".tsv")


def rewrite(words: Sequence[str], choices: Callable[[str], list[str]], sweep: bool, answers: bool = False) -> list[str]:
    """Put texts and paths in Hydra's quotes, spell `data=FILE` as `data=file data.path='FILE'`, check group choices.

    choices: what a group offers, nothing for a key that is no group. sweep: whether commas separate values.
    answers: whether a path of data may be one of sampled answers, as for `dirl sft`.
    Raises DirlError for a word that is no override, and for a choice that its group does not offer.
    """
    for word in words:
        if len(word.partition("=")[0]) > LONGEST_KEY:
            raise DirlError(f"{word[:40]}…: no key is that long; an override has the form KEY=VALUE")
    for word in words:
        if word.startswith("="):
            raise DirlError(f"{word}: an override has the form KEY=VALUE, without spaces")
    rewritten = []
    for word in words:
        rewritten += rewrite_word(word, choices, sweep, answers)
    return rewritten


def expand_all(words: Sequence[str], members: Callable[[str], list[str]]) -> list[str]:
    """Spell `bench=all` as the choices that it stands for. members: those of a group, nothing if it has no `all`."""
    expanded = []
    for word in words:
        group, _, choice = word.partition("=")
        if choice == "all" and (choices := members(group)):
            word = f"{group}={','.join(choices)}"
        expanded.append(word)
    return expanded


def expand_list(words: Sequence[str], group: str, members: Callable[[str], list[str]]) -> list[str]:
    """Spell `bench=[gsm8k,gym:countdown]` as the choices in it, one after another.

    group: whose lists these are. members: what its `all` stands for. Raises DirlError for a list with a gap.
    """
    expanded = []
    for word in words:
        listed = re.fullmatch(rf"{group}=\[(.*)\]", word)
        if listed and not exists(word.partition("=")[2]):  # a file's name, too, may be in brackets
            names: list[str] = []
            for name in split_paths(listed[1]):
                names += members(group) if name.strip() == "all" else [name.strip()]
            if "" in names:
                raise DirlError(f"{word}: a name is missing: give one between any two commas, as in {group}=[a,b]")
            word = f"{group}={','.join(dict.fromkeys(names))}"  # each once
        expanded.append(word)
    return expanded


def require_alone(words: Sequence[str], group: str, name: str) -> None:
    """Raises DirlError where a choice that shares no table with others of its group is swept together with them."""
    for word in words:
        key, _, value = word.partition("=")
        names = value.split(",")
        if key == group and name in names and len(names) > 1:
            raise DirlError(
                f"{word}: {name} has other metrics than the rest, so give {group}={name} in a run of its own"
            )


def collect_bare_words(words: Sequence[str], key: str) -> list[str]:
    """Spell the words that are no overrides, or paths that exist, as one list, the value of `key`."""
    bare = []
    overrides = []
    for word in words:
        is_override = "=" in word or word.startswith("~")
        if is_override and not exists(word):  # a sweep's directories have = in their names
            overrides.append(word)
        else:
            bare.append(QuotedString(word, Quote.single).with_quotes())
    if bare:
        overrides.append(f"{key}=[{','.join(bare)}]")
    return overrides


def choose_files(words: Sequence[str], has: Callable[[str], bool], answers: bool) -> list[str]:
    """Put `bench=file` before a `bench.path=FILE` without it, where the default choice has no key `path`.

    has: whether the config has a key. answers: as in `rewrite`; of those it is `data=rollouts`.
    """
    keys = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    choices = []
    for group in PATH_CHOICE:
        path_key = f"{group}.path"
        if path_key in keys and group not in keys and not has(path_key):
            choices.append(f"{group}={path_choice(group, keys[path_key], answers)}")
    return [*choices, *words]


def path_choice(group: str, path: str, answers: bool) -> str:
    """The choice of a group that reads a path: of data that of sampled answers, where it holds those and may."""
    if group == "data" and answers and holds_answers(Path(unquote(path))):
        return "rollouts"
    return PATH_CHOICE[group]


def holds_answers(path: Path) -> bool:
    """Whether a path is of answers that were sampled, or of a directory with a file of them."""
    if not exists(str(path)):
        return False
    if path.is_file():
        return (path.name == COMPLETIONS or step_of(path) is not None) and begins_with_answer(path)
    steps = [*step_files(path / "rollouts").values(), *step_files(path).values()]
    return any(map(begins_with_answer, [*steps, path / COMPLETIONS]))


def begins_with_answer(file: Path) -> bool:
    """Whether the first line of a file is an answer with the steps that revealed it."""
    try:
        line = json.loads(next(lines_of(file), b"null"))
    except (DirlError, ValueError, RecursionError):
        return False
    return isinstance(line, dict) and {"token_ids", "reveal_step"} <= line.keys()


def drop_preset(words: Sequence[str], preset: str | None) -> list[str]:
    """Put `~experiment` before the words where they choose a model: a preset says how its own model is trained.

    preset: the experiment that the command runs by default, if any.
    """
    keys = {word.partition("=")[0] for word in words}
    if preset and keys & {"model", "model.path"} and not keys & {"experiment", "~experiment"}:
        return ["~experiment", *words]
    return list(words)


def rewrite_word(word: str, choices: Callable[[str], list[str]], sweep: bool, answers: bool) -> list[str]:
    """The overrides that a word stands for, as `rewrite` says."""
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    last_part = name.rpartition(".")[2]
    if equals and name in TEXTS:
        return [f"{key}={quote(value)}"]

    # No value, null, or a function of Hydra's: nothing to quote.
    if equals and value in ("", "null") and choices(name):
        raise DirlError(f"{word} names nothing: choose one of {', '.join(offered(name, choices))}")
    if not value or value == "null" or is_call(value):
        return [word]

    # Mappings: Hydra merges a new one into the old; ours replace it, or stand beside a benchmark's own columns.
    if last_part in MAPPINGS and value[0] == "{" and key == name:
        return [f"~{key}", f"+{key}={value}"]
    if last_part == "columns" and value[0] == "{":
        return [f"+{name}={value}"]

    if last_part in PATHS:
        return [f"{key}={quote_paths(value, sweep)}"]
    if re.fullmatch(r"[\w/]+", key):
        return rewrite_choice(word, choices, sweep, answers)
    return [word]


def offered(group: str, choices: Callable[[str], list[str]]) -> list[str]:
    """What to choose from in a group, in words: its choices, and a path where the group takes one."""
    names = choices(group)
    if group in PATH_CHOICE:
        return [*names, "a path"]
    return names


def rewrite_choice(word: str, choices: Callable[[str], list[str]], sweep: bool, answers: bool) -> list[str]:
    """Spell GROUP=PATH as Hydra's choice of the group that takes a path.

    Raises DirlError for a choice that the group does not offer.
    """
    group, _, value = word.partition("=")
    names = choices(group)
    if not names or value[0] in "{$":
        return [word]
    if value[0] == "[":
        raise DirlError(f"{word}: {one_at_a_time(group, split_paths(value[1:-1]))}")

    # Without -m a comma between names stays: Hydra says what it needs. Any other belongs to a path.
    values = [value]
    if sweep or all(name in names for name in value.split(",")):
        values = split_paths(value)
    paths = [value for value in values if value not in names]
    if not paths:
        return [word]

    if group == "hydra/launcher":
        raise DirlError(f"{word} is in no package that is installed: {pip_install('launchers')}")
    if group not in PATH_CHOICE or not all(looks_like_path(path) for path in paths):
        sentence = f"{group}={paths[0]}: {did_you_mean(paths[0], offered(group, choices))}"
        if len(names) > MANY_CHOICES and "choose one" in sentence:  # whose names alone say little
            raise UnknownChoice(sentence, group)
        raise DirlError(sentence)
    if len(paths) < len(values):
        raise DirlError(f"{word} mixes names and paths: sweep over the names, then over the paths")
    kinds = {path_choice(group, path, answers) for path in paths}
    if len(kinds) > 1:
        raise DirlError(f"{word} mixes sampled answers and other rows: sweep over each by itself")
    quoted = ",".join(quote(unquote(path)) for path in paths)
    return [f"{group}={kinds.pop()}", f"{group}.path={quoted}"]


def one_at_a_time(group: str, values: Sequence[str]) -> str:
    """How to write several choices of a group instead of as a list, in words."""
    names = [value.strip() for value in values]
    if group == "data":
        quoted = [QuotedString(name, Quote.double).with_quotes() for name in names]
        sources = ", ".join(f"{{path: {name}}}" for name in quoted)
        return f"several files are a mixture: data=mix {shell_word('data.sources', f'[{sources}]')}"
    return f"{group} is one at a time: `-m {shell_word(group, ','.join(names))}` runs each"


def is_call(value: str) -> bool:
    """Whether this is one of Hydra's functions, such as choice(a,b)."""
    return re.fullmatch(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", value) is not None


def quote_paths(value: str, sweep: bool) -> str:
    """A path in Hydra's quotes; several each in its own, in a list as in `compare=[A,B]` or where -m sweeps them."""
    as_list = re.fullmatch(r"\[(.*)\]", value)
    if as_list and not exists(value):  # a file's name, too, may be in brackets
        paths = split_paths(as_list[1])
        return f"[{','.join(map(quote_path, paths))}]"
    if sweep:
        return ",".join(map(quote_path, split_paths(value)))
    return quote_path(value)


def split_paths(text: str) -> list[str]:
    """The paths between commas; a comma in the name of one that exists separates nothing."""
    pieces = text.split(",")
    paths = []
    while pieces:
        # The longest beginning that exists is a path; where none does, the first piece is one.
        length = 1
        for count in range(1, min(len(pieces), MOST_COMMAS) + 1):
            if exists(",".join(pieces[:count])):
                length = count
        paths.append(",".join(pieces[:length]))
        pieces = pieces[length:]
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
    if quoted := re.fullmatch(r"""(['"])(.*)\1""", value):
        value = quoted[2]
    return str(Path(os.path.expanduser(value)))


def quote(text: str) -> str:
    """A text in Hydra's quotes, whatever characters it holds."""
    return QuotedString(literal(text), Quote.single).with_quotes()


def quote_path(value: str) -> str:
    """A path in Hydra's quotes. `${…}` in it is what the config says, unless it is part of an existing path's name."""
    path = unquote(value)
    if exists(value):
        return quote(path)
    return QuotedString(path, Quote.single).with_quotes()


def fixed_keys(words: Sequence[str]) -> list[str]:
    """The keys that have the same value in every job of a sweep."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(words))
    except HydraException:
        return []  # Hydra tells what is wrong with it
    return [override.get_key_element() for override in parsed if not override.is_sweep_override()]
