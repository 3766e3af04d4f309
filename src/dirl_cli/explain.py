"""Hydra's complaints about a command line, each in one sentence with its remedy."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from dirl_cli import tree

COMPLAINTS = (HydraException, OmegaConfBaseException)


def explain(error: Exception, command: str, words: Sequence[str]) -> str:
    """One sentence for one of COMPLAINTS that was raised while `command` was composed with `words`."""
    text, cause = str(error), str(error.__cause__ or "")
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override}: an override has the form KEY=VALUE"
        return f"{error.override}: quote the value, as in \"{error.override.partition('=')[0]}='…'\""
    if found := re.search(r"In 'experiment/(.+?)': Could not override '(.+?)'", text):
        return f"experiment={found[1]} is for another command: dirl {command} has no {found[2]}"
    if found := re.search(r"Could not override '(.+?)'", text):
        return f"{found[1]}: no such key; {hint(found[1], keys(command, words))}"
    if found := re.match(r"Error merging override (.+)", text):
        return f"{found[1]}: {first_line(cause)}"
    if found := re.search(r"Ambiguous value for argument '(.+?)'", text):
        key, _, values = found[1].partition("=")
        return f"{found[1]}: add -m to run each of them, or write {key}=[{values}] for a list"
    if found := re.search(r"An item is already at '(.+?)'", text):
        return f"+{found[1]}: the key is there already; write {found[1]}=… without the +"
    if found := re.search(r"Sweep parameters '(.+?)' requires", text):
        return f"{found[1]}: add -m to run each of them"
    if found := re.search(r"You must specify '(.+?)'.*?Available options:\n(.+)", text, re.DOTALL):
        return f"give a value for {found[1]}: {', '.join(found[2].split())}"
    lines = [line.strip() for line in f"{text}\n{cause}".split("Config search path:")[0].splitlines()]
    return "; ".join(line for line in lines if line)


def first_line(text: str) -> str:
    return text.partition("\n")[0]


def keys(command: str, words: Sequence[str]) -> list[str]:
    """The groups and keys of the config that the choices in `words` give, or of the command's own defaults."""
    try:
        groups, values = tree.survey(command, words)
    except ConfigCompositionException:
        groups, values = tree.survey(command, [])
    return [*groups, *values]


def hint(key: str, known: Sequence[str]) -> str:
    """The keys that a mistyped or shortened one may have meant."""
    last = {name: name.rpartition(".")[2] for name in known}
    near = get_close_matches(key, known, n=1)
    near = near or [name for name in known if last[name] in get_close_matches(key, list(last.values()), n=1)]
    return f"did you mean {' or '.join(near)}?" if near else "--cfg job prints every key"
