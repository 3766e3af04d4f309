"""From a reward's name to its function: a built-in one, or a user's own by import path or by file."""

import inspect
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.ranges import require
from dirl_cli.reward.answer import Reward
from dirl_cli.reward.rewards import BUILT_IN


@cache
def find_reward(name: str) -> Reward:
    """The reward called `name`: built in, `my_module.my_reward`, or `rewards.py:my_reward`."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, of_file, function = name.rpartition(":")
    if not of_file:
        path, _, function = name.rpartition(".")
    if not path:
        hint, names = did_you_mean(name, BUILT_IN), ", ".join(BUILT_IN)
        raise DirlError(
            f"no reward is called {name}: {hint if names in hint else f'{hint} There are {names}'};"
            " one of your own is my_module.my_reward or rewards.py:my_reward"
        )
    try:
        module = load_file(Path(path).expanduser().resolve()) if of_file else import_module(path)
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        raise DirlError(f"the reward {name} cannot be loaded ({error}): check its path or its code") from error
    reward = getattr(module, function, None)
    if not callable(reward):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise DirlError(f"{path} has no function {function}: {did_you_mean(function, own)}")
    return reward


def load_file(path: Path) -> ModuleType:
    """A Python file as a module; registered, since dataclasses and pickle look their module up by name."""
    spec = spec_from_file_location(f"reward file {path}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises DirlError where the reward called `name` cannot be called with these options."""
    reward = find_reward(name)
    try:
        inspect.signature(reward).bind(None, **options)
    except TypeError as error:
        raise DirlError(f"reward.options.{name} does not fit the reward {name}: {error}") from error
    if reward in BUILT_IN.values():
        types = get_type_hints(reward, include_extras=True)
        for option, value in options.items():
            require(value, types[option], f"reward.options.{name}.{option}")
