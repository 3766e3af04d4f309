"""Rollouts on disk: a line for each answer of a step in `step-000012.jsonl`, or by gzip in `step-000012.jsonl.gz`."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

from dirl_cli.errors import DirlError
from dirl_cli.files import write_bytes
from dirl_cli.line_files import compressed, lines_of, plain_name, step_files
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import HELD, Problem, StopReason, Trajectory

T = TypeVar("T")
INTEGER_LIMIT = 2**31  # no step, token or count reaches it
FLOAT_LIMIT = 1e15  # no reward or log-prob reaches it: float32 holds its square
ROUNDING = 1e-3  # by which a log-prob may be above 0
TRAJECTORY_COLUMNS = (  # what `dirl generate` writes of an answer's trajectory, each by its field's name
    "prompt_ids",
    "token_ids",
    "reveal_step",
    "logprobs",
    "stop_reason",
    "denoise_forwards",
    "forwards",
    "stop_token_ids",
    "block_size",
    "entropies",  # only where they were recorded
)


@dataclass(frozen=True)
class Record:
    """One sampled answer.

    sample: its index among the answers to its problem. completion: its text up to the stop token.
    reward, parts: the weighted sum and the rewards before weighting; None and empty where there are none.
    correct: verified and complete. learned_from: its group is one that its step learns from; `kept` in files.
    process: what each of its denoising steps or blocks earned besides; empty where that was not computed.
    """

    problem: Problem
    sample: int
    completion: str
    trajectory: Trajectory
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    correct: bool = False
    advantage: float | None = None
    learned_from: bool = False
    process: list[float] = field(default_factory=list)


def rollout_path(directory: Path, step: int, compress: bool = False) -> Path:
    """The file of a step, in the directory `rollouts` of a run."""
    return directory / f"step-{step:06d}.jsonl{'.gz' if compress else ''}"


def rollout_files(directory: Path) -> dict[int, Path]:
    """The files of a run, or of its directory `rollouts`, by step in order. Raises DirlError if there are none."""
    rollouts = directory / "rollouts"
    if not rollouts.is_dir():
        rollouts = directory
    steps = step_files(rollouts)
    if not steps:
        raise DirlError(f"{directory} holds no step-….jsonl: give a run's directory or the rollouts/ in it")
    return steps


def write_rollout(path: Path, records: Iterable[Record]) -> None:
    """Write a step's answers, atomically: a reader finds the complete file or none, even after a crash.

    path: compressed where it ends in .gz. The step's other file, of before a run went on with the other setting, goes.
    """
    lines = (f"{json.dumps(to_json(record))}\n".encode() for record in records)
    plain = plain_name(path)
    packed = plain.with_name(f"{plain.name}.gz")
    write_bytes(path, compressed(lines) if path == packed else lines)
    other = plain if path == packed else packed
    other.unlink(missing_ok=True)


def read_rollout(path: Path) -> list[Record]:
    """Read a step's answers, floats to the last bit. Raises DirlError that names a malformed line."""
    return [record for _, record in read_lines(path)]


def read_lines(path: Path, parse: Callable[[Any], Record] | None = None) -> Iterator[tuple[str, Record]]:
    """Read a step's answers, each with "FILE line N" for messages about it. Raises DirlError like `read_rollout`.

    parse: makes a record of what a line holds, where that is not what `write_rollout` writes.
    """
    for number, line in enumerate(lines_of(path), start=1):
        location = f"{path} line {number}"
        yield location, read_line(location, line, parse or from_json)


def require_learnable(location: str, answer: Trajectory, lm: DiffusionLM) -> None:
    """Raises DirlError for an answer that `lm` cannot have given and so cannot learn from.

    location: file and line of the answer, for the message.
    """
    length = len(answer.prompt_ids) + len(answer.token_ids)
    size = lm.block_size
    if answer.block_size not in (None, size):
        raise DirlError(
            f"{location} was sampled in blocks of {answer.block_size} and the model's are of {size}:"
            " set model.block_size as it was"
        )

    # Any of these would be an index error, or a state that the sampler never was in, only when a model computes on it.
    largest_step = max(answer.reveal_step)
    largest_token = max(answer.prompt_ids + answer.token_ids)
    never_sampled = set(answer.token_ids) & set(lm.unsampled_ids)
    reason = None
    if length % size:
        reason = f"prompt_ids and token_ids are {length} tokens, which is not whole blocks of {size}"
    elif length > lm.longest_prompt + 1:
        reason = f"prompt_ids and token_ids are {length} tokens, and the model has {lm.max_length} positions"
    elif largest_step == HELD:
        reason = "every token of it was held, so that there is nothing to learn from"
    elif largest_step > size:
        reason = f"reveal_step holds {largest_step}, and a block of {size} has no more steps than tokens"
    elif largest_token >= lm.vocab_size:
        reason = f"token {largest_token} is beyond the model's {lm.vocab_size}"
    elif never_sampled:
        reason = f"token_ids holds {min(never_sampled)}, which stands for no text and is never sampled"
    if reason:
        raise DirlError(f"{location}: {reason}; give the model that it was sampled from, or correct or remove it")


def distinct(answers: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    """The answers without those that were given a hint, each once.

    One that is in the files of two steps is the same: a group that is left over is in that of the step that learns from
    it, too. Of a hinted answer only the rest of its tokens is its own.
    """
    read = set()
    for location, record in answers:
        answer = record.trajectory
        identity = (
            problem_key(record),
            record.sample,
            answer.weights_version,
            tuple(answer.token_ids),
            tuple(answer.logprobs),
        )
        if not answer.is_hinted and identity not in read:
            read.add(identity)
            yield location, record


def problem_key(record: Record) -> tuple[str, tuple[int, ...]]:
    """What the answers to a problem have in common: its name and its prompt."""
    return record.problem.id, tuple(record.trajectory.prompt_ids)


def read_line(location: str, line: bytes, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of a line. Raises DirlError that begins with `location` for anything else."""
    try:
        return parse(json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DirlError(f"{location} is not valid JSON: correct or remove it") from error
    except KeyError as error:
        raise DirlError(f"{location} has no {error.args[0]}: correct or remove it") from error
    except (TypeError, ValueError) as error:
        raise DirlError(f"{location}: {error}; correct or remove it") from error


def to_json(record: Record) -> dict[str, Any]:
    """A record as one flat JSON object, beginning with what people look for."""
    return {
        "problem": record.problem.id,
        "subset": record.problem.subset,
        "sample": record.sample,
        **({"system": record.problem.system} if record.problem.system else {}),
        "question": record.problem.question,
        "answer": record.problem.answer,
        "completion": record.completion,
        "reward": record.reward,
        "parts": record.parts,
        **({"process": record.process} if record.process else {}),
        "correct": record.correct,
        "advantage": record.advantage,
        "kept": record.learned_from,
        "verifier": record.problem.verifier,
        "details": record.problem.details,
        **trajectory_to_json(record.trajectory),
    }


def trajectory_to_json(trajectory: Trajectory) -> dict[str, Any]:
    """Its fields, arrays as lists; those that most answers do not have only where this one does."""
    fields = dict(vars(trajectory))
    for name in ("versions", "entropies"):
        if not fields[name]:
            del fields[name]
    return {name: list(value) if isinstance(value, array | bytearray) else value for name, value in fields.items()}


def trajectory_columns(trajectory: Trajectory) -> dict[str, Any]:
    """What `dirl generate` writes of an answer's trajectory: see TRAJECTORY_COLUMNS."""
    fields = trajectory_to_json(trajectory)
    return {column: fields[column] for column in TRAJECTORY_COLUMNS if column in fields}


def from_json(line: Any) -> Record:
    """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else; ignores further keys."""
    if not isinstance(line, dict):
        raise TypeError("an answer is an object")
    parts = value_of_type(line, "parts", dict)
    return Record(
        problem=Problem(
            id=value_of_type(line, "problem", str),
            question=value_of_type(line, "question", str),
            answer=value_of_type(line, "answer", str),
            subset=value_of_type(line, "subset", str),
            system=value_of_type(line, "system", str) if "system" in line else "",
            **verification_from_json(line),
        ),
        sample=integer(line, "sample"),
        completion=value_of_type(line, "completion", str),
        trajectory=trajectory_from_json(line),
        reward=finite_number(line, "reward", float, int, NoneType),
        parts={name: finite_number(parts, name, float, int) for name in parts},
        process=finite_numbers(line, "process") if "process" in line else [],
        correct=value_of_type(line, "correct", bool),
        advantage=finite_number(line, "advantage", float, int, NoneType),
        learned_from=value_of_type(line, "kept", bool),
    )


def verification_from_json(line: dict[str, Any]) -> dict[str, Any]:
    """How the answer is verified; nothing where earlier versions did not write that down."""
    if "verifier" not in line:
        return {}
    return {"verifier": value_of_type(line, "verifier", str), "details": value_of_type(line, "details", dict)}


def trajectory_from_json(line: dict[str, Any]) -> Trajectory:
    """The fields of a trajectory in a record's object. Raises like `from_json`, and where fields disagree."""
    block_size = None
    if line.get("block_size") is not None:  # earlier versions did not write it down
        block_size = integer(line, "block_size", least=1)
    trajectory = Trajectory(
        prompt_ids=integers(line, "prompt_ids"),
        token_ids=integers(line, "token_ids"),
        reveal_step=integers(line, "reveal_step"),
        logprobs=list_of_type(line, "logprobs", float, int),
        stop_reason=value_of_type(line, "stop_reason", str),
        denoise_forwards=integer(line, "denoise_forwards", least=1),
        forwards=integer(line, "forwards", least=1),
        weights_version=integer(line, "weights_version"),
        stop_token_ids=tuple(integers(line, "stop_token_ids")),
        block_size=block_size,
        versions=integers(line, "versions") if "versions" in line else [],
        entropies=finite_numbers(line, "entropies") if "entropies" in line else [],
    )
    if trajectory.stop_reason not in get_args(StopReason):
        raise ValueError(f"no stop_reason is called {trajectory.stop_reason}")
    if not len(trajectory.token_ids) == len(trajectory.reveal_step) == len(trajectory.logprobs):
        raise ValueError("token_ids, reveal_step and logprobs differ in length")
    if len(trajectory.token_versions) != len(trajectory.token_ids):
        raise ValueError("token_ids and versions differ in length")
    if trajectory.entropies and len(trajectory.entropies) != len(trajectory.token_ids):
        raise ValueError("token_ids and entropies differ in length")
    if not trajectory.token_ids:
        raise ValueError("token_ids is empty, and an answer is at least a block")
    if not all(-FLOAT_LIMIT < logprob < ROUNDING for logprob in trajectory.logprobs):
        raise ValueError("logprobs holds what is no logarithm of a probability")
    if trajectory.denoise_forwards > trajectory.forwards:
        raise ValueError(f"denoise_forwards is {trajectory.denoise_forwards} of {trajectory.forwards} forwards")
    return trajectory


def value_of_type(line: dict[str, Any], name: str, *types: type) -> Any:
    """The value of a key, which must be of one of these types and not of one derived from them (a bool is no int)."""
    value = line[name]
    if type(value) not in types:
        raise TypeError(f"{name} is not {any_of(types)}")
    return value


def list_of_type(line: dict[str, Any], name: str, *types: type) -> list[Any]:
    """The value of a key, which must be a list of values of these types."""
    values: list[Any] = value_of_type(line, name, list)
    if not set(map(type, values)) <= set(types):
        raise TypeError(f"{name} holds something that is not {any_of(types)}")
    return values


def any_of(types: tuple[type, ...]) -> str:
    return " or ".join(one_type.__name__ for one_type in types)


def finite_number(line: dict[str, Any], name: str, *types: type) -> Any:
    """The value of a key: a number that float32 can hold and square, or None where NoneType is among `types`."""
    value = value_of_type(line, name, *types)
    if value is not None and not abs(value) < FLOAT_LIMIT:
        raise ValueError(f"{name} is no finite number, or beyond {FLOAT_LIMIT:.0e}")
    return value


def finite_numbers(line: dict[str, Any], name: str) -> list[float]:
    """The value of a key, a list of numbers that float32 can hold and square."""
    values = list_of_type(line, name, float, int)
    if not all(abs(value) < FLOAT_LIMIT for value in values):
        raise ValueError(f"{name} holds no finite number, or one beyond {FLOAT_LIMIT:.0e}")
    return values


def integer(line: dict[str, Any], name: str, least: int = 0) -> int:
    """The value of a key, an int from `least` on."""
    return require_range(name, value_of_type(line, name, int), least)


def integers(line: dict[str, Any], name: str, least: int = 0) -> list[int]:
    """The value of a key, a list of ints from `least` on."""
    values = list_of_type(line, name, int)
    if values:
        require_range(name, min(values), least)
        require_range(name, max(values), least)
    return values


def require_range(name: str, value: int, least: int) -> int:
    if not least <= value < INTEGER_LIMIT:
        raise ValueError(f"{name} holds {str(value)[:20]}, and counts from {least} on")
    return value
