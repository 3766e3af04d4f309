"""Which versions of which packages this project admits, and which of them are installed."""

import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

from packaging.requirements import Requirement

from dirl_cli.files import conf_dir, installed

TORCH_COMPANIONS = ("torchvision", "torchaudio")  # which transformers imports where they are, and which want one torch


@dataclass(frozen=True)
class Requirements:
    """What the project needs always, and for each extra."""

    python: str
    always: tuple[str, ...]
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_requirements(checkout: Path) -> Requirements:
    """The requirements of a checkout's pyproject.toml; of the installed package where there is none."""
    file = checkout / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        extras = {name: tuple(lines) for name, lines in project["optional-dependencies"].items()}
        return Requirements(project["requires-python"], tuple(project["dependencies"]), extras)

    always = []
    by_extra: dict[str, list[str]] = {}
    for line in requires("dirl") or ():
        wanted, _, condition = line.partition(";")
        match = re.search(r"extra == ['\"](.+)['\"]", condition)
        if match:
            by_extra.setdefault(match[1], []).append(wanted.strip())
        else:
            always.append(wanted.strip())
    extras = {name: tuple(lines) for name, lines in by_extra.items()}
    return Requirements(metadata("dirl")["Requires-Python"], tuple(always), extras)


def checkout_directory() -> Path:
    """Where pyproject.toml lies, if this is a checkout."""
    return conf_dir().parent


def installed_versions(requirements: Requirements) -> dict[str, str | None]:
    """The version of each package that anything here wants, None where it is not installed."""
    wanted = list(requirements.always)
    for lines in requirements.extras.values():
        wanted += lines
    names = [Requirement(line).name for line in wanted]
    return {name: installed(name) for name in (*names, *TORCH_COMPANIONS)}


def is_admitted(requirement: str, version: str) -> bool:
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def torch_wanted_by(names: Iterable[str]) -> dict[str, str]:
    """What some installed packages want of torch, such as `torch==2.13.0`, by their names; some want none."""
    wanted = {}
    for name in names:
        try:
            lines = requires(name) or ()
        except PackageNotFoundError:
            continue
        for line in lines:
            requirement = Requirement(line)
            if requirement.name == "torch" and requirement.specifier and not requirement.marker:
                wanted[name] = f"torch{requirement.specifier}"
    return wanted


def pip_command(lines: Iterable[str]) -> str:
    return f"pip install {' '.join(map(shlex.quote, lines))}"
