"""Read the files of a run, which may be half-written, damaged or somebody else's: what cannot be read is not there."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from dirl_cli.errors import DirlError
from dirl_cli.line_files import lines_of

SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C it takes a tenth of the time
COMMANDS = {"rl": "rl", "dpo": "dpo", "bench": "eval", "masking": "sft"}  # by a key that only its config has

Numbers = dict[str, float]


def text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_mapping(file: Path) -> dict[str, Any]:
    """What a JSON file holds, where that is an object."""
    try:
        content = json.loads(text_of(file))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_settings(run: Path) -> dict[str, Any]:
    """A run's config.yaml; nothing where it is none of ours."""
    try:
        content = yaml.load(text_of(run / "config.yaml"), SAFE_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and command_of(content) else {}


def command_of(settings: Mapping[str, Any]) -> str:
    """The command whose configuration this is, "" where it is none's."""
    for key, command in COMMANDS.items():
        if key in settings:
            return command
    return ""


def read_history(run: Path) -> list[Numbers]:
    """The lines of metrics.jsonl, by ascending steps: of a step that stands there twice the later line."""
    by_step = {}
    for text in text_of(run / "metrics.jsonl").splitlines():
        line = numbers_of(text)
        if "step" in line:
            by_step[line["step"]] = line
    return [by_step[step] for step in sorted(by_step)]


def numbers_of(text: str) -> Numbers:
    """The finite numbers of a line of JSON; nothing of one that is torn."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return only_numbers(content) if isinstance(content, dict) else {}


def only_numbers(content: Mapping[str, Any]) -> Numbers:
    numbers = {}
    for name, value in content.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            numbers[name] = value
    return numbers


def last_measured(lines: Sequence[str], names: Iterable[str]) -> Numbers:
    """The last value of each of some metrics; of a long file only the lines that tell them are parsed."""
    values: Numbers = {}
    missing = set(names)
    for text in reversed(lines):
        if not missing:
            break
        if any(f'"{name}"' in text for name in missing):
            line = numbers_of(text)
            values |= {name: line[name] for name in missing if name in line}
            missing -= set(line)
    return values


def read_objects(file: Path, most: int) -> list[dict[str, Any]]:
    """The first objects of a file with one a line, which may be compressed."""
    rows: list[dict[str, Any]] = []
    try:
        for line in lines_of(file):
            if len(rows) == most:
                break
            try:
                row = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
    except DirlError:
        return rows
    return rows


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of which there is a whole checkpoint: SHA256SUMS is written last."""
    steps = []
    for file in (run / "checkpoints").glob("step-*/SHA256SUMS"):
        number = file.parent.name.removeprefix("step-")
        if number.isdigit():
            steps.append(int(number))
    return sorted(steps)
