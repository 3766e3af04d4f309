"""Answers that exist already, whatever gave them: read with mistakes by line, graded without a model."""

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.evaluation.answers import GradedAnswer, checked
from dirl_cli.evaluation.run import explained, with_credit
from dirl_cli.reward.grading import Grader
from dirl_cli.types import Problem

OUR_FIELDS = {field.name for field in fields(GradedAnswer)}
NEEDED = {field.name for field in fields(GradedAnswer) if field.default is MISSING}  # all that earlier versions wrote


def read_predictions(lines: Iterable[tuple[str, Mapping[str, Any]]], problems: Sequence[Problem]) -> list[GradedAnswer]:
    """The answers of (location, fields) in their order, not graded yet, those to one problem numbered as they come.

    A line has the `index` of a problem, counted from 0, and a `completion`; or it is one of our own answers.jsonl.
    Raises DirlError that names the location of the first line that is neither.
    """
    by_id = {problem.id: problem for problem in problems}
    counts: Counter[str] = Counter()
    answers = []
    for location, line in lines:
        if NEEDED <= line.keys() <= OUR_FIELDS:
            answer = own_answer(location, line)
        else:
            answer = foreign_answer(location, line, problems)
        if answer.problem not in by_id:
            raise DirlError(f"{location} answers problem {answer.problem}, which the benchmark has not: check bench")
        # Our own files may hold a sample twice, and joined files the same numbers: each line counts as a sample.
        complete = explained(answer, by_id[answer.problem])
        answers.append(replace(complete, sample=counts[answer.problem]))
        counts[answer.problem] += 1
    return answers


def own_answer(location: str, line: Mapping[str, Any]) -> GradedAnswer:
    """A line of an answers.jsonl of ours. Raises DirlError where a field is of another type."""
    try:
        return checked(GradedAnswer(**line))
    except TypeError as error:
        raise DirlError(f"{location} is not an answer ({error}): correct or remove it") from error


def foreign_answer(location: str, line: Mapping[str, Any], problems: Sequence[Problem]) -> GradedAnswer:
    """A line of `index` and `completion`, of which nothing else is known. Raises DirlError where it is none."""
    index, completion = line.get("index"), line.get("completion")
    if type(index) is not int or not 0 <= index < len(problems):
        expected = f"a whole number from 0 to {len(problems) - 1}, the place of a problem in the benchmark"
        raise DirlError(f"{location}: index must be {expected}, {instead_of(line, 'index')}")
    if not isinstance(completion, str):
        raise DirlError(f"{location}: completion must be the text of an answer, {instead_of(line, 'completion')}")
    # It counts as complete, since nothing tells that it was cut off; 0 forwards say that it was not sampled here.
    return GradedAnswer(
        problem=problems[index].id,
        sample=0,
        text=completion,
        correct=False,
        stop_reason="stop",
        length=0,
        tokens=0,
        denoise_forwards=0,
        forwards=0,
        seconds=0.0,
    )


def instead_of(line: Mapping[str, Any], key: str) -> str:
    """What a line has where something else belongs, in words."""
    if key not in line:
        return "and is missing"
    return f"not {json.dumps(line[key])[:40]}"


def regraded(answers: Sequence[GradedAnswer], problems: Iterable[Problem], grader: Grader) -> Iterator[GradedAnswer]:
    """The answers with their verdicts, in the order in which those are reached."""
    by_id = {problem.id: problem for problem in problems}
    by_key: dict[Hashable, GradedAnswer] = dict(enumerate(answers))
    items = ((key, by_id[answer.problem], answer.text) for key, answer in by_key.items())
    for key, credit in grader.grade(items):
        yield with_credit(by_key[key], credit)
