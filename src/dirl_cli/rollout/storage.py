"""Rollouts on disk: `step-000012.jsonl` with a line for each answer of a step, to look at, score again or replay."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from dirl_cli.errors import DirlError
from dirl_cli.files import write_text
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Problem, StopReason, Trajectory

WHOLE_NUMBERS = 2**31  # and more is no step, no token and no count
LARGEST = 1e15  # of a reward or log-prob: float32 holds its square
ROUNDING = 1e-3  # by which a log-prob may be above 0


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
    return [record for _, record in read_lines(path)]


def read_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """Likewise, each with its file and line, in words."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path} line {number}"
                yield place, read_line(place, line)
    except OSError as error:
        raise DirlError(f"{path} cannot be read ({error.strerror}): check the path") from error


def require_learnable(place: str, found: Trajectory, lm: DiffusionLM) -> None:
    """Raises DirlError, which names the place, for an answer that `lm` cannot have given and so cannot learn from."""
    length, size = len(found.prompt_ids) + len(found.token_ids), lm.block_size
    if found.block_size not in (None, size):
        raise DirlError(
            f"{place} was sampled in blocks of {found.block_size} and the model's are of {size}:"
            " set model.block_size as it was"
        )
    reason = None
    if length % size:
        reason = f"prompt_ids and token_ids are {length} tokens, which is not whole blocks of {size}"
    elif length > lm.longest_prompt + 1:
        reason = f"prompt_ids and token_ids are {length} tokens, and the model has {lm.max_length} positions"
    elif max(found.reveal_step) > size:
        reason = f"reveal_step holds {max(found.reveal_step)}, and a block of {size} has no more steps than tokens"
    elif max(found.prompt_ids + found.token_ids) >= lm.vocab_size:
        reason = f"token {max(found.prompt_ids + found.token_ids)} is beyond the model's {lm.vocab_size}"
    elif strange := set(found.token_ids) & set(lm.unsampled_ids):
        reason = f"token_ids holds {min(strange)}, which stands for no text and is never sampled"
    if reason:
        raise DirlError(f"{place}: {reason}; give the model that it was sampled from, or correct or remove it")


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
        sample=whole(line, "sample"),
        completion=typed(line, "completion", str),
        trajectory=trajectory(line),
        reward=number(line, "reward", float, int, NoneType),
        parts={name: number(parts, name, float, int) for name in parts},
        correct=typed(line, "correct", bool),
        advantage=number(line, "advantage", float, int, NoneType),
        kept=typed(line, "kept", bool),
    )


def trajectory(line: dict[str, Any]) -> Trajectory:
    found = Trajectory(
        prompt_ids=wholes(line, "prompt_ids"),
        token_ids=wholes(line, "token_ids"),
        reveal_step=wholes(line, "reveal_step", least=1),
        logprobs=typed_list(line, "logprobs", float, int),
        stop_reason=typed(line, "stop_reason", str),
        denoise_forwards=whole(line, "denoise_forwards", least=1),
        forwards=whole(line, "forwards", least=1),
        weights_version=whole(line, "weights_version"),
        stop_token_ids=tuple(wholes(line, "stop_token_ids")),
        block_size=None if line.get("block_size") is None else whole(line, "block_size", least=1),  # once not noted
    )
    if found.stop_reason not in get_args(StopReason):
        raise ValueError(f"no stop_reason is called {found.stop_reason}")
    if not len(found.token_ids) == len(found.reveal_step) == len(found.logprobs):
        raise ValueError("token_ids, reveal_step and logprobs differ in length")
    if not found.token_ids:
        raise ValueError("token_ids is empty, and an answer is at least a block")
    if not all(-LARGEST < logprob < ROUNDING for logprob in found.logprobs):
        raise ValueError("logprobs holds what is no logarithm of a probability")
    if found.denoise_forwards > found.forwards:
        raise ValueError(f"denoise_forwards is {found.denoise_forwards} of {found.forwards} forwards")
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


def number(line: dict[str, Any], name: str, *kinds: type) -> Any:
    """A number of which float32 can make something, or what else is of `kinds`."""
    value = typed(line, name, *kinds)
    if value is not None and not abs(value) < LARGEST:
        raise ValueError(f"{name} is no finite number, or beyond {LARGEST:.0e}")
    return value


def whole(line: dict[str, Any], name: str, least: int = 0) -> int:
    return in_range(name, typed(line, name, int), least)


def wholes(line: dict[str, Any], name: str, least: int = 0) -> list[int]:
    values = typed_list(line, name, int)
    for value in (min(values), max(values)) if values else ():
        in_range(name, value, least)
    return values


def in_range(name: str, value: int, least: int) -> int:
    if not least <= value < WHOLE_NUMBERS:
        raise ValueError(f"{name} holds {str(value)[:20]}, and counts from {least} on")
    return value
