"""What of a run's configuration is no default: the words that would turn a command's defaults into it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dirl_cli.cli import config_tree
from dirl_cli.cli.complete import format_completion
from dirl_cli.cli.config_tree import leaves
from dirl_cli.cli.former import todays_target
from dirl_cli.cli.run_dir import START
from dirl_cli.files import conf_dir

TARGET = "_target_"
SAME_CLASS = 1000  # outweighs whatever a choice has otherwise
MISSED = 3  # a value that a choice has otherwise outweighs so many that it has alike
COMPUTED = ("model.name", "data.name", "bench.name")  # from a path, where one is given


def departures(command: str, settings: Mapping[str, Any], said: Sequence[str]) -> list[str]:
    """The choices and values that a run has and its command's defaults do not, as `key=value`.

    settings: the run's configuration. said: the words of the command that started it, which name its choices; where
    they do not, as in a sweep, the files that the run is most like do.
    Nothing where the defaults of this version cannot be composed any more.
    """
    config_tree.prepare(None)
    preset = preset_words(command, said)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            choices = said_choices(said)
            if "model" in settings:
                choices.setdefault("model", choice_of("model", settings["model"]) or "path")
            likelier = likelier_choices(composed_choices(command, preset, choices), choices, settings)
            for group, choice in list(likelier.items()):
                # A choice may bring others along, as data do the instruction.
                others = {name: likelier[name] for name in likelier if name != group}
                if composed_choices(command, preset, choices | others).get(group) == choice:
                    del likelier[group]
            choices |= likelier
            cfg = compose(command, [*preset, *choice_words(choices)])
    except (HydraException, OmegaConfBaseException):
        return []

    words = [*(word for word in preset if "=" in word), *choice_words(choices), *differing_values(cfg, settings)]
    path = settings["model"].get("path") if "model" in settings else None
    if f"model.path={format_completion(path)}" in words and "model=path" in words:  # as it is usually said
        words[words.index("model=path")] = f"model={format_completion(path)}"
        words.remove(f"model.path={format_completion(path)}")
    return words


def composed_choices(command: str, preset: Sequence[str], choices: Mapping[str, str]) -> dict[str, Any]:
    """The choice of each group once some are made, while Hydra is initialised."""
    cfg = compose(command, [*preset, *choice_words(choices)], return_hydra_config=True)
    return {str(group): choice for group, choice in cfg.hydra.runtime.choices.items()}


def said_choices(said: Sequence[str]) -> dict[str, str]:
    """The choices among `said`, by group."""
    choices = {}
    for word in said:
        group, _, choice = word.partition("=")
        if group != "experiment" and (conf_dir() / group / f"{choice}.yaml").is_file():
            choices[group] = choice
    return choices


def choice_words(choices: Mapping[str, str]) -> list[str]:
    return [f"{group}={choice}" for group, choice in choices.items()]


def preset_words(command: str, said: Sequence[str]) -> list[str]:
    """The preset that a run was begun with; none where it was given a model and no preset."""
    for word in said:
        if word.startswith("experiment=") and "," not in word:
            return [word]
    preset = config_tree.preset(command)
    if preset and said and not any(word.startswith(("model=", "model.path=")) for word in said):
        return [f"experiment={preset}"]
    return ["~experiment"] if preset else []


def likelier_choices(
    composed: Mapping[str, Any], choices: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, str]:
    """Of groups without a known choice that which the run is more like than the one that was composed, by group."""
    better = {}
    for group, choice in composed.items():
        node = settings.get(group)
        if group in choices or group == "experiment" or "/" in group or not isinstance(node, dict):
            continue
        likely = choice_of(group, node)
        if likely and agreement(group, likely, node) > agreement(group, str(choice), node):
            better[group] = likely
    return better


def choice_of(group: str, node: Any) -> str | None:
    """The choice of a group that a part of a configuration is most like, None where it is like none."""
    if not isinstance(node, dict):
        return None
    scores = {file.stem: agreement(group, file.stem, node) for file in sorted((conf_dir() / group).glob("*.yaml"))}
    best = max(scores, key=lambda name: scores[name], default=None)
    return best if best and scores[best] > 0 else None


def agreement(group: str, choice: str, node: Mapping[str, Any]) -> int:
    """How much of a choice's own file a part of a configuration has, less what it has otherwise; 0 for another class.

    What is computed from other settings does not count.
    """
    file = conf_dir() / group / f"{choice}.yaml"
    if not file.is_file():
        return 0
    own = dict(leaves(own_values(file)))
    theirs = {key: today(key, value) for key, value in leaves(node)}
    if own.get(TARGET) != theirs.get(TARGET):
        return 0
    score = SAME_CLASS
    for key, value in own.items():
        is_open = isinstance(value, str) and ("${" in value or value == "???")
        if key == "defaults" or is_open or key not in theirs:
            continue
        score += 1 if theirs[key] == value else -MISSED
    return score


def own_values(file: Path) -> dict[str, Any]:
    """What a config file says of its group itself, and the files that it is built on below it."""
    text = file.read_text(encoding="utf-8")
    values: Any = yaml.safe_load(text) or {}
    if text.startswith("# @package _global_"):  # then it may say more than that
        return dict(values.get(file.parent.name, {}))
    for entry in values.get("defaults", ()):
        group, base = next(iter(entry.items())) if isinstance(entry, dict) else ("@_here_", entry)
        folder, _, place = str(group).partition("@")
        parent = conf_dir() / folder.strip("/") if folder.startswith("/") else file.parent / folder
        if place == "_here_" and (parent / f"{base}.yaml").is_file():
            values = own_values(parent / f"{base}.yaml") | values
    return values


def differing_values(cfg: DictConfig, settings: Mapping[str, Any]) -> list[str]:
    """The values that are no defaults, once the choices are made."""
    defaults = dict(leaves(OmegaConf.to_container(cfg)))
    values = {key: today(key, value) for key, value in leaves(settings)}

    # What follows from other settings is compared with what it follows to from the run's own.
    for key, value in values.items():
        if key in defaults and not is_reference(defaults[key]):
            OmegaConf.update(cfg, key, value, force_add=True)
    words = []
    for key, value in values.items():
        default = OmegaConf.select(cfg, key) if is_reference(defaults.get(key)) else defaults.get(key)
        if isinstance(default, DictConfig) or OmegaConf.is_list(default):
            default = OmegaConf.to_container(default)
        is_told = key.partition(".")[0] not in START and key not in COMPUTED
        if is_told and (key not in defaults or not alike(default, value)):
            words.append(f"{key}={format_completion(value)}")
    return words


def alike(a: Any, b: Any) -> bool:
    """Whether two values are the same; YAML has 1e-6 as a text and 1.0e-06 as a number."""
    return bool(a == b) or str(a) == str(b)


def is_reference(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def today(key: str, value: Any) -> Any:
    """A value, import paths as they are today."""
    return todays_target(value) if key.endswith(TARGET) else value
