"""Tasks of reasoning-gym as choices: `bench=gym:TASK` is bench=gym with its task, so that it goes beside others."""

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dirl_cli.cli.build import build
from dirl_cli.files import conf_dir


def name_gym_tasks(words: Sequence[str]) -> list[str]:
    """Spell each gym:TASK of a `bench=` as the choice gym-TASK, and make that known to Hydra.

    Raises DirlError for a task that reasoning-gym does not have.
    """
    named = []
    for word in words:
        key, equals, value = word.partition("=")
        if key == "bench":
            choices = []
            for choice in value.split(","):
                task = re.fullmatch(r"gym:(\w+)", choice)
                choices.append(offer_task(task[1]) if task else choice)
            word = key + equals + ",".join(choices)
        named.append(word)
    return named


def offer_task(task: str) -> str:
    """Store bench=gym with a task as a choice of its own, and return its name; a sweep's launcher hands it on."""
    settings = {"task": task, "name": f"gym-{task}"}
    gym: Any = OmegaConf.merge(OmegaConf.load(conf_dir() / "bench" / "gym.yaml"), {"bench": settings})
    build(gym.bench)  # here, and not when the benchmarks before it have taken their hours

    node = {"defaults": ["gym", "_self_"], "bench": settings}
    ConfigStore.instance().store(settings["name"], node, group="bench", package="_global_")
    return settings["name"]
