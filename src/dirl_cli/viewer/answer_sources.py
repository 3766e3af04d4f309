"""Read answers to look at: of rollouts, of `dirl generate`, or of an evaluation, which keeps no tokens."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dirl_cli.errors import DirlError
from dirl_cli.evaluation.answers import GradedAnswer, checked, read_answers
from dirl_cli.evaluation.predictions import NEEDED
from dirl_cli.evaluation.result_card import ANSWERS
from dirl_cli.line_files import lines_of, plain_name, step_files, step_of
from dirl_cli.rollout.storage import (
    Record,
    from_json,
    integer,
    read_line,
    read_lines,
    rollout_files,
    trajectory_from_json,
)
from dirl_cli.sft.answer_files import COMPLETIONS
from dirl_cli.types import Problem, Trajectory

Kind = Literal["rollouts", "completions", "evaluation"]
LINES_OF: dict[Kind, set[str]] = {  # the keys that tell what a line is
    "rollouts": {"problem", "kept", "token_ids"},
    "completions": {"index", "token_ids", "reveal_step"},
    "evaluation": NEEDED,
}
REMEDY = "give what `dirl rl`, `dirl generate` or `dirl eval` left: a run's directory, or a .jsonl of answers in it"


@dataclass(frozen=True)
class ShownAnswer:
    """An answer as it is shown.

    step: of the run that sampled it. trajectory: None where the file holds no tokens. length: tokens before the stop
    token. correct, reward, advantage, learned_from, extracted: None where nobody told; extracted: the final answer.
    """

    problem: Problem
    sample: int
    text: str
    length: int
    forwards: int
    stop_reason: str
    trajectory: Trajectory | None = None
    step: int | None = None
    correct: bool | None = None
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    advantage: float | None = None
    learned_from: bool | None = None
    extracted: str | None = None


@dataclass(frozen=True)
class AnswerSource:
    """The answers of a directory or file. left_out: how many more it holds."""

    path: Path
    kind: Kind
    answers: list[ShownAnswer]
    left_out: int

    @property
    def name(self) -> str:
        return source_name(self.path)


def source_name(path: Path) -> str:
    """What to call answers: the directory of the run, with the step where there is one alone, or the file's name."""
    path = path.resolve()
    if path.name in ("rollouts", ANSWERS, COMPLETIONS):
        return path.parent.name
    if path.parent.name == "rollouts":
        return f"{path.parents[1].name} {plain_name(path).stem}"
    return plain_name(path).stem if path.is_file() else path.name


def read_source(path: Path, limit: int) -> AnswerSource:
    """Read the answers in a directory or file, about `limit` of them: of a run whole steps, spread evenly.

    Raises DirlError where there are none, and for a malformed line.
    """
    steps = files_by_step(path)
    total = sum(map(count_lines, steps.values()))
    kind = kind_of(next(iter(steps.values())))

    # Of several steps none is cut off; all else is.
    if kind == "rollouts":
        steps = spread_steps(steps, total, limit)
    most = limit if len(steps) == 1 else None
    answers: Iterator[ShownAnswer]
    if kind == "evaluation":
        answers = map(of_evaluation, read_answers(*steps.values()))
    elif kind == "completions":
        answers = (of_record(record, None) for file in steps.values() for _, record in read_lines(file, completion))
    else:
        answers = (of_record(record, step) for step, file in steps.items() for _, record in read_lines(file))
    shown = list(islice(answers, most))
    if not shown:
        raise DirlError(f"{path} holds no answers yet: {REMEDY}")
    return AnswerSource(path, kind, shown, total - len(shown))


def files_by_step(path: Path) -> dict[int, Path]:
    """The files of answers of a directory by step, or a file itself. Raises DirlError where there is none."""
    if path.is_file():
        return {step_of(path) or 0: path}
    if not path.is_dir():
        raise DirlError(f"{path} is not there: {REMEDY}")
    for name in (ANSWERS, COMPLETIONS):
        if (path / name).is_file():
            return {0: path / name}
    if not step_files(path) and not step_files(path / "rollouts"):
        raise DirlError(f"{path} holds no answers: {REMEDY}")
    return rollout_files(path)


def count_lines(file: Path) -> int:
    return sum(1 for _ in lines_of(file))


def kind_of(file: Path) -> Kind:
    """What a file holds, by its first line. Raises DirlError where those are no answers."""
    try:
        line = json.loads(next(lines_of(file), b"null"))
    except (ValueError, RecursionError) as error:
        raise DirlError(f"{file} line 1 is not valid JSON: {REMEDY}") from error
    for kind, keys in LINES_OF.items():
        if isinstance(line, dict) and keys <= line.keys():
            return kind
    raise DirlError(f"{file} holds no answers: {REMEDY}")


def spread_steps(steps: dict[int, Path], total: int, limit: int) -> dict[int, Path]:
    """As many steps as hold `limit` of the `total` answers where all hold the same: first, last and between."""
    count = min(len(steps), max(1, limit * len(steps) // total))
    numbers = list(steps)
    places = {round(k * (len(steps) - 1) / max(1, count - 1)) for k in range(1, count)} | {0 if count > 1 else -1}
    return {numbers[place]: steps[numbers[place]] for place in sorted(places)}


def of_record(record: Record, step: int | None) -> ShownAnswer:
    """An answer with its tokens. step: None where it is no run's, and then nobody graded it."""
    is_graded = step is not None
    return ShownAnswer(
        problem=record.problem,
        sample=record.sample,
        text=record.completion,
        length=len(record.trajectory.completion_ids),
        forwards=record.trajectory.forwards,
        stop_reason=record.trajectory.stop_reason,
        trajectory=record.trajectory,
        step=step,
        correct=record.correct if is_graded else None,
        reward=record.reward,
        parts=record.parts,
        advantage=record.advantage,
        learned_from=record.learned_from if is_graded else None,
    )


def parse_line(kind: Kind, step: int, location: str, line: bytes) -> ShownAnswer:
    """An answer by its line in a file of a kind. Raises DirlError that begins with `location` for anything else."""
    if kind == "evaluation":
        return of_evaluation(read_line(location, line, graded))
    if kind == "completions":
        return of_record(read_line(location, line, completion), None)
    return of_record(read_line(location, line, from_json), step)


def graded(line: Any) -> GradedAnswer:
    """A line that `dirl eval` wrote. Raises TypeError for anything else."""
    return checked(GradedAnswer(**line))


def of_evaluation(answer: GradedAnswer) -> ShownAnswer:
    """An answer of which an evaluation kept the text and the counts."""
    return ShownAnswer(
        problem=Problem(answer.problem, answer.question, answer.reference),
        sample=answer.sample,
        text=answer.text,
        length=answer.length,
        forwards=answer.forwards,
        stop_reason=answer.stop_reason,
        correct=answer.correct,
        reward=answer.credit,
        extracted=answer.extracted,
    )


def completion(line: Any) -> Record:
    """A line that `dirl generate` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    if not isinstance(line, dict):
        raise TypeError("a completion is an object")
    number = integer(line, "index")
    text = line.get("text")  # None of a model without a tokenizer
    return Record(
        problem=Problem(str(line.get("id", number)), question_of(line), ""),
        sample=integer(line, "sample"),
        completion=text if isinstance(text, str) else "",
        trajectory=trajectory_from_json({"weights_version": 0, "stop_token_ids": [], **line}),
    )


def question_of(line: dict[str, Any]) -> str:
    """What was asked: the question, the prompt, or the last turn of the chat."""
    content = line.get("question", line.get("prompt", ""))
    turns = line.get("messages")
    if not content and isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        content = turns[-1].get("content", "")
    return content if isinstance(content, str) else json.dumps(content)
