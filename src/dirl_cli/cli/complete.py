"""Shell completion: a command's groups with their choices, and every key of the chosen config at its value."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dirl_cli.cli import config_tree, overrides
from dirl_cli.errors import DirlError


def complete_override(command: str, words: Sequence[str], incomplete: str, config_dir: Path | None = None) -> list[str]:
    """The completions of `incomplete`, the last word of `dirl COMMAND WORDS…`, as the shell wants them."""
    config_tree.prepare(config_dir)
    *words, word = rejoin([*words, incomplete])
    try:
        completions = all_completions(command, words)
    except (DirlError, HydraException, OmegaConfBaseException):  # an earlier word does not compose (yet)
        return []
    typed = word.removesuffix(incomplete)  # what the shell keeps of the word itself
    return [completion.removeprefix(typed) for completion in completions if completion.startswith(word)]


def rejoin(words: Sequence[str]) -> list[str]:
    """Undo bash, which hands over `model=sdar8b` as the three words model, = and sdar8b."""
    *words, word = re.sub(" ?= ?", "=", " ".join(words)).split(" ")
    if words and "=" not in words[-1]:  # `model=` and nothing after it: Typer dropped the `=`
        word = f"{words.pop()}={word}"
    return [*words, word]


def all_completions(command: str, words: Sequence[str]) -> list[str]:
    """Full `key=value` words: every choice of every group, every key at its value, every model trained here."""
    words = overrides.rewrite(words, config_tree.choices, sweep=False, answers=command == "sft")
    groups, values = config_tree.survey(command, overrides.drop_preset(words, config_tree.preset(command)))
    completions = []
    for group, names in groups.items():
        completions += [f"{group}={name}" for name in names]
    if "model" in groups:
        completions += [f"model={path}" for path in sorted(Path("runs").glob("*/*/model"))]
    completions += [f"{key}={format_completion(value)}" for key, value in values.items()]
    return completions


def format_completion(value: object) -> str:
    """A value as it is typed on the command line; nothing for one that is computed from others or still missing."""
    if isinstance(value, str) and (value == "???" or "${" in value):
        return ""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...").replace(", ", ",")
