"""Build the object that a group's config describes, every field converted and checked."""

import re
from dataclasses import fields, replace
from importlib import import_module
from typing import Any, TypeVar, cast, get_origin, get_type_hints, overload

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from dirl_cli.cli.config_tree import with_bases
from dirl_cli.cli.former import todays_target
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.files import conf_dir
from dirl_cli.ranges import refusal, require, require_shape, type_at
from dirl_cli.text import literal

T = TypeVar("T")


@overload
def build(cfg: DictConfig) -> Any: ...
@overload
def build(cfg: DictConfig, kind: type[T]) -> T: ...
def build(cfg: DictConfig, kind: type | None = None) -> Any:
    """An instance of the dataclass `kind`, or of the one that `cfg._target_` names, every field converted and checked.

    A value that names a `_target_` of its own, such as algo.views, is built the same way.
    Raises DirlError that names the key: a wrong type, an unknown or a missing field, a target that is not there.
    """
    group = str(cfg._get_full_key(None)) or "config"
    if kind is None and "_target_" not in cfg:
        raise DirlError(f"{group} has no _target_, so there is nothing to make of it: choose {group}=… anew")
    kind = kind or find_class(str(cfg._target_), group)
    settings = cast(dict[str, Any], literal(OmegaConf.to_container(cfg, resolve=True)))
    settings.pop("_target_", None)
    for key, value in settings.items():
        if isinstance(value, dict) and "_target_" in value:
            settings[key] = build(cfg[key])

    # OmegaConf converts and checks types; the ranges of our own annotations come on top.
    require_shape(settings, kind, group)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(kind), settings)
        require(OmegaConf.to_container(typed, throw_on_missing=True), kind, group)
        built = OmegaConf.to_object(typed)
    except MissingMandatoryValue as error:
        raise DirlError(f"give a value for {group}.{error.full_key}, such as {group}.{error.full_key}=…") from error
    except ConfigKeyError as error:
        names = [field.name for field in fields(cast(Any, error.object_type))]  # of `kind`, or of what it holds
        raise DirlError(f"{group}.{error.full_key}: no such key; {did_you_mean(str(error.key), names)}") from error
    except OmegaConfBaseException as error:
        value = value_at(settings, str(error.full_key))
        hint = type_at(kind, str(error.full_key))
        raise DirlError(refusal(f"{group}.{error.full_key}", value, hint)) from error
    return with_tuples(built)


def build_choice(group: str, name: str, **settings: Any) -> Any:
    """The object that conf/`group`/`name`.yaml describes, with `settings` in place of its own values.

    Raises DirlError for a name that the group does not offer.
    """
    files = {file.stem: file for file in sorted((conf_dir() / group).glob("*.yaml"))}
    if name not in files:
        raise DirlError(f"{group}={name}: {did_you_mean(name, files)}")
    cfg = OmegaConf.merge({"seed": 0, group: with_bases(files[name])}, {group: settings})
    return build(cast(DictConfig, cfg)[group])


def build_settings(group: str, settings: dict[str, Any], kind: type | None = None) -> Any:
    """The object that plain settings describe, as `build` makes it. group: what they are called in a sentence."""
    cfg = OmegaConf.create({group: literal(settings)})[group]
    return build(cfg, kind) if kind else build(cfg)


def value_at(container: Any, key: str) -> Any:
    """The value in nested containers under a full key, such as sources[0].weight."""
    value = container
    for step in re.findall(r"[^.\[\]]+", key):
        value = value[int(step)] if isinstance(value, list | tuple) else value[step]
    return value


def find_class(target: str, group: str) -> type:
    """Import the class that `_target_` of a group names. Raises DirlError where there is none."""
    module_name, _, name = todays_target(target).rpartition(".")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError, TypeError, RecursionError) as error:
        raise DirlError(f"{group}._target_={target}: {error}") from error
    if not hasattr(module, name):
        public = [attribute for attribute in vars(module) if not attribute.startswith("_")]
        raise DirlError(f"{group}._target_={target}: {module_name} has no {name}; {did_you_mean(name, public)}")
    return cast(type, getattr(module, name))


def with_tuples(built: Any) -> Any:
    """The object with tuples where its dataclass declares them: OmegaConf gives lists."""
    types = get_type_hints(type(built))
    names = [field.name for field in fields(built) if get_origin(types[field.name]) is tuple]
    if not names:
        return built
    return replace(built, **{name: tuple(getattr(built, name)) for name in names})
