"""Hydra's complaints about a command line, each in one sentence with its remedy."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, ValidationError

from dirl_cli.cli import config_tree, schema
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


def explain(error: Exception, command: str, words: Sequence[str]) -> str:
    """One sentence for one of COMPLAINTS that was raised while `command` was composed with `words`."""
    text, cause = str(error), str(error.__cause__ or "")
    if isinstance(error, InterpolationResolutionError):
        key = f"{error.full_key}: " if error.full_key else ""
        return f"{key}{first_line(text)}; a text that holds ${{…}} is written \\${{…}}"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override}: an override has the form KEY=VALUE"
        return f"{error.override}: {quoting_hint(*error.override.partition('=')[::2])}"
    if found := re.search(r"In '(\w+)/(.+?)': Could not override '(.+?)'", text):
        return f"{found[1]}={found[2]} is for another command: dirl {command} has no {found[3]}"
    if found := re.search(r"Could not (?:override|delete from config\.) '(.+?)'", text):
        return f"{found[1]}: no such key; {hint(command, found[1], known_keys(command, words))}"
    if sentence := explain_type_error(error, command):
        return sentence
    if found := re.match(r"Error merging override (.+)", text):
        return f"{found[1]}: {first_line(cause)}"
    if found := re.search(r"Ambiguous value for argument '(.+?)'", text):
        key, _, values = found[1].partition("=")
        as_list = f", or write {key}=[{values}] for a list" if config_tree.is_list(command, words, key) else ""
        return f"{found[1]}: add -m to run each of them{as_list}"
    if found := re.search(r"An item is already at '(.+?)'", text):
        return f"+{found[1]}: the key is there already; write {found[1]}=… without the +"
    if found := re.search(r"Sweep parameters '(.+?)' requires", text):
        return f"{found[1]}: add -m to run each of them"
    if found := re.search(r"You must specify '(.+?)'.*?Available options:\n(.+)", text, re.DOTALL):
        return f"give a value for {found[1]}: {', '.join(found[2].split())}"
    lines = [line.strip() for line in f"{text}\n{cause}".split("Config search path:")[0].splitlines()]
    return "; ".join(line for line in lines if line)


def explain_type_error(error: Exception, command: str) -> str:
    """The sentence for a value of another type than a command's setting has; nothing for any other error."""
    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return ""
    setting = type_at(schema.SCHEMAS[command], str(cause.full_key))
    override = re.match(r"Error merging override (.+)", str(error))
    return f"{override[1] if override else cause.full_key}: give {describe_type(setting)}" if setting else ""


def first_line(text: str) -> str:
    return text.partition("\n")[0]


def known_keys(command: str, words: Sequence[str]) -> list[str]:
    """The groups and keys of the config that the choices in `words` give, or of the command's own defaults."""
    try:
        groups, values = config_tree.survey(command, words)
    except ConfigCompositionException:
        groups, values = config_tree.survey(command, [])
    return [*groups, *values]


def hint(command: str, key: str, known: Sequence[str]) -> str:
    """The keys that a mistyped or shortened one may have meant."""
    near = [ELSEWHERE[key]] if ELSEWHERE.get(key) in known else get_close_matches(key, known, n=1)
    last = {name: name.rpartition(".")[2] for name in known}
    near = near or [name for name in known if last[name] in get_close_matches(key, list(last.values()), n=1)]
    return f"did you mean {' or '.join(near)}?" if near else f"`dirl {command} --cfg job` prints every key"


def quoting_hint(key: str, value: str) -> str:
    """How a value is written that Hydra cannot read."""
    if value[:1] in ("[", "{"):
        return "write a list as [a, b] and a mapping as {key: value}, and put texts in it in quotes"
    return f"quote the value, as in {shell_word(key, QuotedString(literal(value), Quote.double).with_quotes())}"


def explain_options(command: str, words: Sequence[str]) -> str:
    """One sentence for `--steps 10`: how options are written here."""
    known, given, meant = known_keys(command, []), list(words), []
    while given:
        word = given.pop(0)
        if not word.startswith("-"):
            continue
        option, equals, value = word.partition("=")
        name = option.lstrip("-").replace("-", "_")
        takes_next = not equals and given and not given[0].startswith("-") and "=" not in given[0]
        if not equals:
            value = given.pop(0) if takes_next else "true"
        same = [key for key in (name, ELSEWHERE.get(name)) if key in known]
        same = same or [key for key in known if key.rpartition(".")[2] == name]
        if not same:
            return f"{option}: no such key; {hint(command, name, known)}"
        meant.append(shell_word(same[0], value))
    return f"options are written without dashes: `dirl {command} {' '.join(meant)}`"
