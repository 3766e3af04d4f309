"""The config tree: where it lies, what it offers, and how a user's own tree comes before it."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import dirl_cli.cli.schema  # noqa: F401  # registers the schemas
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.text import literal


def prepare(config_dir: Path | None) -> None:
    """Make Hydra find the user's tree before ours, and Python the modules in the working directory."""
    if "" not in sys.path:
        sys.path.append("")  # so that a `_target_` may name a module in the working directory
    if config_dir:
        require_tree(config_dir)
    UserConfigs.directory = config_dir
    Plugins.instance().register(UserConfigs)


def require_tree(directory: Path) -> None:
    """Raises DirlError for a directory that holds no configs, or one that cannot be read."""
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    commands = {path.name for path in conf_dir().glob("*.yaml")}
    files = sorted(directory.rglob("*.yaml"))
    has_config = False
    for file in files:
        is_command = file.parent == directory and file.name in commands
        if file.parent.name in groups or is_command:
            has_config = True
    if not has_config:
        raise DirlError(f"{directory} is no config tree: it holds no GROUP/NAME.yaml such as experiment/mine.yaml")

    # Hydra would report a broken file only once it is chosen, and then by its own words.
    for file in files:
        require_yaml(file)


def require_yaml(file: Path) -> None:
    """Raises DirlError that names a file which is not a config."""
    try:
        config = OmegaConf.load(file)
        if not isinstance(config, DictConfig) or not isinstance(config.get("defaults", ListConfig([])), ListConfig):
            raise ValueError("it is a mapping, and its defaults a list")
        for entry in config.get("defaults", ()):
            if not isinstance(entry, str | DictConfig):
                raise ValueError(f"an entry of its defaults is {entry}, and neither a name nor a mapping")
        FileConfigSource("user", f"file://{file.parent.resolve()}").load_config(file.name)  # which reads its header too
    except (YAMLError, ValueError, OmegaConfBaseException, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DirlError(f"{file} is not a config that can be read ({reason}): correct it") from error


class UserConfigs(SearchPathPlugin):
    """Lets the user's files shadow ours. Hydra's own --config-dir lets ours shadow theirs."""

    directory: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.directory:
            search_path.prepend("--config-dir", f"file://{self.directory.resolve()}")


def preset(command: str) -> str | None:
    """The experiment that a command runs when it is told nothing else, if any."""
    file = conf_dir() / f"{command}.yaml"
    if UserConfigs.directory and (UserConfigs.directory / file.name).exists():
        file = UserConfigs.directory / file.name
    config: Any = OmegaConf.to_container(OmegaConf.load(file))
    for entry in config.get("defaults", []):
        if isinstance(entry, dict) and "experiment" in entry:
            experiment: str | None = entry["experiment"]
            return experiment
    return None


def choices(group: str) -> list[str]:
    """The choices of a config group, in the user's tree and in ours; nothing if there is no such group."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return group_options(group)


def group_options(group: str) -> list[str]:
    """The same, while Hydra is initialised."""
    return GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)


def with_bases(file: Path) -> DictConfig:
    """A config merged over the siblings that its defaults name; without Hydra, which may be busy with another."""
    config: Any = OmegaConf.load(file)
    bases = [with_bases(file.with_stem(base)) for base in config.pop("defaults", []) if base != "_self_"]
    merged: Any = OmegaConf.merge(*bases, config)
    return merged


def members_of_all(group: str) -> list[str]:
    """The choices that `all` of a group stands for, nothing if it has no such choice."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        if "all" not in group_options(group):
            return []
        return list(compose(f"{group}/all")[group].each)


def has_key(command: str, words: Sequence[str], key: str) -> bool:
    """Whether a command's config has a key, the choices in `words` made."""
    try:
        return key in survey(command, words)[1]
    except ConfigCompositionException:  # a choice is still missing
        return False


def is_list(command: str, words: Sequence[str], key: str) -> bool:
    """Whether a key of a command's config takes a list, the choices in `words` made."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        choices_made = [word for word in words if group_options(word.partition("=")[0]) and "," not in word]
        cfg = compose(command, choices_made)
        *parents, last = key.split(".")
        parent = OmegaConf.select(cfg, ".".join(parents)) if parents else cfg
        return isinstance(parent, DictConfig) and isinstance(parent._get_node(last), ListConfig)


def survey(command: str, words: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The groups of a command with their choices, and the keys of its config with their values.

    words: overrides, of which only the choices of groups count.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        choices_made = [word for word in words if group_options(word.removeprefix("~").partition("=")[0])]
        cfg = compose(command, choices_made, return_hydra_config=True)
        names = [str(group) for group in cfg.hydra.runtime.choices]
        groups = {name: group_options(name) for name in names if not name.startswith("hydra/")}

    # What Hydra itself and the classes behind a choice are called is nothing to set.
    values = {}
    for key, value in leaves(OmegaConf.to_container(cfg)):
        if not key.startswith("hydra.") and not key.endswith("_target_"):
            values[key] = value
    return groups, values


def resolve(cfg: DictConfig) -> None:
    """Put values in the place of references; a text with `${…}` in it stays one, which OmegaConf.resolve forgets."""
    OmegaConf.resolve(cfg)
    for key, value in leaves(OmegaConf.to_container(cfg)):
        if literal(value) != value:
            OmegaConf.update(cfg, key, literal(value))


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and value of everything in a nested dict that is not a dict itself."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
