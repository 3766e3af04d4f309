"""From a group's config to the object it describes."""

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
    given = cast(dict[str, Any], literal(OmegaConf.to_container(cfg, resolve=True)))
    given.pop("_target_", None)
    nested = [key for key, value in given.items() if isinstance(value, dict) and "_target_" in value]
    given |= {key: build(cfg[key]) for key in nested}
    require_shape(given, kind, group)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(kind), given)
        require(OmegaConf.to_container(typed, throw_on_missing=True), kind, group)
        built = OmegaConf.to_object(typed)
    except MissingMandatoryValue as error:
        raise DirlError(f"give a value for {group}.{error.full_key}, such as {group}.{error.full_key}=…") from error
    except ConfigKeyError as error:
        known = [field.name for field in fields(cast(Any, error.object_type))]  # of `kind`, or of what it holds
        raise DirlError(f"{group}.{error.full_key}: no such key; {did_you_mean(str(error.key), known)}") from error
    except OmegaConfBaseException as error:
        value, hint = value_at(given, str(error.full_key)), type_at(kind, str(error.full_key))
        raise DirlError(refusal(f"{group}.{error.full_key}", value, hint)) from error
    return with_tuples(built)


def build_choice(group: str, name: str, **given: Any) -> Any:
    """What conf/`group`/`name`.yaml describes, with the values `given` in place of its own."""
    files = {file.stem: file for file in sorted((conf_dir() / group).glob("*.yaml"))}
    if name not in files:
        raise DirlError(f"{group}={name}: {did_you_mean(name, files)}")
    cfg = OmegaConf.merge({"seed": 0, group: with_bases(files[name])}, {group: given})
    return build(cast(DictConfig, cfg)[group])


def build_settings(group: str, settings: dict[str, Any]) -> Any:
    """What plain settings describe. group: what they are called in a sentence."""
    return build(OmegaConf.create({group: literal(settings)})[group])


def value_at(given: Any, key: str) -> Any:
    """What stands in nested containers under a full key, such as sources[0].weight."""
    for part in re.findall(r"[^.\[\]]+", key):
        given = given[int(part)] if isinstance(given, list | tuple) else given[part]
    return given


def find_class(target: str, group: str) -> type:
    """The class that an import path names."""
    module_name, _, name = todays_target(target).rpartition(".")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError, TypeError, RecursionError) as error:
        raise DirlError(f"{group}._target_={target}: {error}") from error
    if not hasattr(module, name):
        known = [known for known in vars(module) if not known.startswith("_")]
        raise DirlError(f"{group}._target_={target}: {module_name} has no {name}; {did_you_mean(name, known)}")
    return cast(type, getattr(module, name))


def with_tuples(built: Any) -> Any:
    """OmegaConf gives lists where a dataclass declares tuples."""
    types = get_type_hints(type(built))
    tuples = [field.name for field in fields(built) if get_origin(types[field.name]) is tuple]
    return replace(built, **{name: tuple(getattr(built, name)) for name in tuples}) if tuples else built
