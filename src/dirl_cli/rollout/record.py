"""Rollouts on disk: `step-000012.jsonl` with a line for each answer of a step, to look at, score again or replay."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from dirl_cli.disk import write_text
from dirl_cli.errors import DirlError
from dirl_cli.types import Problem, StopReason, Trajectory


@dataclass(frozen=True)
class Record:
    """One sampled answer.

    sample: its index among the answers to its problem. completion: its text up to the stop token.
    reward, parts: the weighted sum and the rewards before weighting; None and empty where there are none.
    correct: verified and complete. kept: it took part in the update, its group having passed the filter.
    """

    problem: Problem
    sample: int
    completion: str
    trajectory: Trajectory
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    correct: bool = False
    advantage: float | None = None
    kept: bool = True


def rollout_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}.jsonl"


def rollout_files(directory: Path) -> dict[int, Path]:
    """The files of a directory, or of the run that it is, by step in order. Raises DirlError if there are none."""
    inside = directory / "rollouts"
    found = (inside if inside.is_dir() else directory).glob("step-*.jsonl")
    steps = {int(match[1]): path for path in found if (match := re.fullmatch(r"step-(\d+)", path.stem))}
    if not steps:
        raise DirlError(f"{directory} holds no step-….jsonl: give a run's directory or the rollouts/ in it")
    return dict(sorted(steps.items()))


def write_rollout(path: Path, records: Iterable[Record]) -> None:
    """Write a step's answers: whoever looks finds the whole file or none, even after a crash."""
    write_text(path, (json.dumps(to_json(record)) + "\n" for record in records))


def read_rollout(path: Path) -> list[Record]:
    """A step's answers as they were written, floats to the last bit. Raises DirlError that names a malformed line."""
    try:
        with path.open("rb") as file:
            return [read_line(f"{path} line {number}", line) for number, line in enumerate(file, start=1)]
    except OSError as error:
        raise DirlError(f"{path} cannot be read ({error.strerror}): check the path") from error


def read_line(place: str, line: bytes) -> Record:
    try:
        return from_json(json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DirlError(f"{place} is not valid JSON: correct or remove it") from error
    except KeyError as error:
        raise DirlError(f"{place} has no {error.args[0]}: correct or remove it") from error
    except (TypeError, ValueError) as error:
        raise DirlError(f"{place}: {error}; correct or remove it") from error


def to_json(record: Record) -> dict[str, Any]:
    """One flat object, what people look for first."""
    return {
        "problem": record.problem.id,
        "subset": record.problem.subset,
        "sample": record.sample,
        "question": record.problem.question,
        "answer": record.problem.answer,
        "completion": record.completion,
        "reward": record.reward,
        "parts": record.parts,
        "correct": record.correct,
        "advantage": record.advantage,
        "kept": record.kept,
        **vars(record.trajectory),
    }


def from_json(line: Any) -> Record:
    """What `to_json` gave. Raises KeyError, TypeError or ValueError for anything else; further keys are ignored."""
    if not isinstance(line, dict):
        raise TypeError("an answer is an object")
    parts = typed(line, "parts", dict)
    return Record(
        problem=Problem(*(typed(line, name, str) for name in ("problem", "question", "answer", "subset"))),
        sample=typed(line, "sample", int),
        completion=typed(line, "completion", str),
        trajectory=trajectory(line),
        reward=typed(line, "reward", float, int, NoneType),
        parts={name: typed(parts, name, float, int) for name in parts},
        correct=typed(line, "correct", bool),
        advantage=typed(line, "advantage", float, int, NoneType),
        kept=typed(line, "kept", bool),
    )


def trajectory(line: dict[str, Any]) -> Trajectory:
    found = Trajectory(
        prompt_ids=typed_list(line, "prompt_ids", int),
        token_ids=typed_list(line, "token_ids", int),
        reveal_step=typed_list(line, "reveal_step", int),
        logprobs=typed_list(line, "logprobs", float, int),
        stop_reason=typed(line, "stop_reason", str),
        denoise_forwards=typed(line, "denoise_forwards", int),
        forwards=typed(line, "forwards", int),
        weights_version=typed(line, "weights_version", int),
        stop_token_ids=tuple(typed_list(line, "stop_token_ids", int)),
        block_size=typed({"block_size": None, **line}, "block_size", int, NoneType),  # earlier runs did not note it
    )
    if found.stop_reason not in get_args(StopReason):
        raise ValueError(f"no stop_reason is called {found.stop_reason}")
    if not len(found.token_ids) == len(found.reveal_step) == len(found.logprobs):
        raise ValueError("token_ids, reveal_step and logprobs differ in length")
    return found


def typed(line: dict[str, Any], name: str, *kinds: type) -> Any:
    """The value of a key, which must be of one of these types and not of one derived from them."""
    value = line[name]
    if type(value) not in kinds:
        raise TypeError(f"{name} is not {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def typed_list(line: dict[str, Any], name: str, *kinds: type) -> list[Any]:
    values: list[Any] = typed(line, name, list)
    if not set(map(type, values)) <= set(kinds):
        raise TypeError(f"{name} holds something that is not {' or '.join(kind.__name__ for kind in kinds)}")
    return values
