"""Hydra's complaints about a command line, each in one sentence with its remedy."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, ValidationError

from dirl_cli.cli import config_tree, schema
from dirl_cli.files import conf_dir
from dirl_cli.ranges import describe_type, type_at
from dirl_cli.text import literal, shell_word

COMPLAINTS = (HydraException, OmegaConfBaseException)
ELSEWHERE = {  # what other toolkits call our keys
    "batch_size": "rollout.max_batch",
    "benchmark": "bench",
    "checkpoint": "model",
    "dataset": "data",
    "learning_rate": "optim.lr",
    "max_length": "max_tokens",
    "max_steps": "steps",
    "n": "samples",
    "num_generations": "rl.group_size",
    "num_samples": "samples",
    "output_dir": "out",
    "tasks": "bench",
}
FEW = 3  # choices that a sentence names
GROUP_OF_CHOICE = {("eval", "data"): "bench=likelihood"}  # groups that a command has with one choice of another alone


def explain(error: Exception, command: str, words: Sequence[str]) -> str:
    """One sentence for one of COMPLAINTS that was raised while `command` was composed with `words`."""
    text = str(error)
    cause = str(error.__cause__ or "")

    # Errors that have a class of their own.
    if isinstance(error, InterpolationResolutionError):
        key = f"{error.full_key}: " if error.full_key else ""
        return f"{key}{first_line(text)}; a text that holds ${{…}} is written \\${{…}}"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override}: an override has the form KEY=VALUE"
        return f"{error.override}: {quoting_hint(*error.override.partition('=')[::2])}"

    # The rest are told apart by Hydra's words.
    if match := re.search(r"In '(\w+)/(.+?)': Could not override '(.+?)'", text):
        return f"{match[1]}={match[2]} is for another command: dirl {command} has no {match[3]}"
    if match := re.search(r"Could not (?:override|delete from config\.) '(.+?)'", text):
        if choice := GROUP_OF_CHOICE.get((command, match[1])):
            return f"{match[1]} is read with {choice} alone: give that too, or leave {match[1]} out"
        return f"{match[1]}: no such key; {hint(command, match[1], known_keys(command, words))}"
    if sentence := explain_type_error(error, command):
        return sentence
    if match := re.match(r"Error merging override (.+)", text):
        return f"{match[1]}: {first_line(cause)}"
    if match := re.search(r"Ambiguous value for argument '(.+?)'", text):
        key, _, values = match[1].partition("=")
        valid = known_keys(command, words)
        if key not in valid:
            return f"{key}: no such key; {hint(command, key, valid)}"
        sentence = f"{match[1]}: add -m to run each of them"
        if config_tree.is_list(command, words, key):
            sentence += f", or write {key}=[{values}] for a list"
        return sentence
    if match := re.search(r"An item is already at '(.+?)'", text):
        return f"+{match[1]}: the key is there already; write {match[1]}=… without the +"
    if match := re.search(r"Sweep parameters '(.+?)' requires", text):
        return f"{match[1]}: add -m to run each of them"
    if match := re.search(r"You must specify '(.+?)'.*?Available options:\n(.+)", text, re.DOTALL):
        return f"give a value for {match[1]}: {', '.join(match[2].split())}"

    # Hydra's own words, in a line, without the list of directories that it searched.
    lines = [line.strip() for line in f"{text}\n{cause}".split("Config search path:")[0].splitlines()]
    return "; ".join(line for line in lines if line)


def explain_type_error(error: Exception, command: str) -> str:
    """The sentence for a value of another type than a command's setting has; "" for any other error."""
    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return ""
    setting = type_at(schema.SCHEMAS[command], str(cause.full_key))
    if not setting:
        return ""
    name = cause.full_key
    if override := re.match(r"Error merging override (.+)", str(error)):
        name = override[1]
    return f"{name}: give {describe_type(setting)}"


def first_line(text: str) -> str:
    return text.partition("\n")[0]


def known_keys(command: str, words: Sequence[str]) -> list[str]:
    """The groups and keys of the config that the choices in `words` give, or of the command's own defaults."""
    try:
        groups, values = config_tree.survey(command, words)
    except ConfigCompositionException:
        groups, values = config_tree.survey(command, [])
    return [*groups, *values]


def hint(command: str, key: str, valid: Sequence[str]) -> str:
    """The keys that a mistyped or shortened one may have meant, or the choices that have it, to append to an error.

    valid: the full keys to choose from.
    """
    others = choices_with(key) if key.partition(".")[0] in valid else []
    if 0 < len(others) <= FEW:
        return f"it is a key of {' and '.join(others)}"
    if ELSEWHERE.get(key) in valid:
        matches = [ELSEWHERE[key]]
    else:
        matches = get_close_matches(key, valid, n=1)
    if not matches:  # then by last parts: `lr` means optim.lr
        last_parts = {name: name.rpartition(".")[2] for name in valid}
        closest = get_close_matches(key, list(last_parts.values()), n=1)
        matches = [name for name in valid if last_parts[name] in closest]
    if not matches:
        return f"`dirl {command} --cfg job` prints every key"
    return f"did you mean {' or '.join(matches)}?"


def choices_with(key: str) -> list[str]:
    """The choices of a key's group that have it, such as rollout=native of rollout.products."""
    group, _, rest = key.partition(".")
    files = sorted((conf_dir() / group).glob("*.yaml"))
    return [f"{group}={file.stem}" for file in files if rest in dict(config_tree.leaves(yaml_settings(file)))]


def yaml_settings(file: Path) -> Any:
    """What a file of conf/ says by itself."""
    return OmegaConf.to_container(OmegaConf.load(file))


def quoting_hint(key: str, value: str) -> str:
    """How a value is written that Hydra cannot read."""
    if value[:1] in ("[", "{"):
        return "write a list as [a, b] and a mapping as {key: value}, and put texts in it in quotes"
    return f"quote the value, as in {shell_word(key, QuotedString(literal(value), Quote.double).with_quotes())}"


def explain_options(command: str, words: Sequence[str]) -> str:
    """One sentence for `--steps 10`: how options are written here."""
    valid = known_keys(command, [])
    remaining = list(words)
    overrides = []
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("-"):
            continue
        option, equals, value = word.partition("=")
        name = option.lstrip("-").replace("-", "_")

        # `--steps 10` takes the next word for its value; `--watch` alone means true.
        if not equals:
            value = "true"
            if remaining and not remaining[0].startswith("-") and "=" not in remaining[0]:
                value = remaining.pop(0)

        # As for an override: the key itself, another toolkit's name of it, or its last part.
        keys = [key for key in (name, ELSEWHERE.get(name)) if key in valid]
        if not keys:
            keys = [key for key in valid if key.rpartition(".")[2] == name]
        if not keys:
            return f"{option}: no such key; {hint(command, name, valid)}"
        overrides.append(shell_word(keys[0], value))
    return f"options are written without dashes: `dirl {command} {' '.join(overrides)}`"
