"""Answers on disk: a JSON line for each as it is graded, read back when the same evaluation goes on."""

import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar, get_args, get_origin, get_type_hints

from dirl_cli.errors import DirlError
from dirl_cli.types import StopReason

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


@dataclass(frozen=True)
class GradedAnswer:
    """One graded completion.

    length: tokens before the stop token. tokens: all that were revealed, whole blocks.
    seconds: sampling time since the answer before it, so that an evaluation's sum is its sampling time.
    question, reference, extracted: what was asked, a right answer and the final answer in the text, None without one;
    credit: what the verifier gives, from 0 to 1, which is correct, None of an answer that is not graded.
    Files of earlier versions lack these.
    """

    problem: str
    sample: int
    text: str
    correct: bool
    stop_reason: StopReason
    length: int
    tokens: int
    denoise_forwards: int
    forwards: int
    seconds: float
    question: str = ""
    reference: str = ""
    extracted: str | None = None
    credit: float | None = None


class AnswerLog:
    """Appends answers to a file, each in one write, so that several processes may share it. Use as a context.

    An answer is a dataclass of values that JSON can hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def append(self, answer: "DataclassInstance") -> None:
        """Append a line. Raises DirlError where the disk does not take it."""
        line = (json.dumps(asdict(answer)) + "\n").encode()
        try:
            while line:  # a disk that fills up takes a part, then refuses
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise DirlError(
                f"{self.path} cannot be written ({error.strerror}): make room, then give the same command to go on"
            ) from error


def drop_torn_line(path: Path) -> None:
    """Cut off what an interrupted write left behind the last complete line."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def read_answers(path: Path) -> list[GradedAnswer]:
    """The answers of a file, none if it is not there; the last of two to the same sample of a problem counts."""
    if not path.exists():
        return []
    answers = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            answer = checked(GradedAnswer(**json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise DirlError(f"{path} line {number} is not an answer: remove it, and it is sampled again") from error
        answers[answer.problem, answer.sample] = answer
    return list(answers.values())


def checked(values: T) -> T:
    """A dataclass whose values come from a file, unchanged. Raises TypeError for the first of another type."""
    for name, kind in get_type_hints(type(values)).items():
        if not is_a(getattr(values, name), kind):
            raise TypeError(f"{name} is {getattr(values, name)!r}")
    return values


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a type: a class, a Literal, a union, list or dict of these. A bool is no int."""
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is UnionType:
        return any(is_a(value, alternative) for alternative in arguments)
    if origin is list:
        return isinstance(value, list) and all(is_a(item, arguments[0]) for item in value)
    if origin is dict:
        key_kind, value_kind = arguments
        if not isinstance(value, dict):
            return False
        return all(is_a(key, key_kind) and is_a(item, value_kind) for key, item in value.items())
    # JSON does not tell 1.0 from 1: a whole number will do where a float belongs.
    return type(value) is kind or (kind is float and type(value) is int)


class SampleRange(NamedTuple):
    """Samples `first` to `end` - 1 of the problem at `problem_index` in its list."""

    problem_index: int
    first: int
    end: int


def missing(problem_ids: Sequence[str], n: int, done: Collection[tuple[str, int]]) -> Iterator[SampleRange]:
    """The samples of each problem that are not among the `done` (problem id, sample), in ranges without a gap."""
    for index, problem_id in enumerate(problem_ids):
        first = None
        for sample in range(n + 1):  # one more than there are, which ends the last range
            is_missing = sample < n and (problem_id, sample) not in done
            if is_missing and first is None:
                first = sample
            elif not is_missing and first is not None:
                yield SampleRange(index, first, sample)
                first = None
