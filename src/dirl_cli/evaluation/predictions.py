"""Answers that exist already, whatever gave them: read with mistakes by line, graded without a model."""

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.evaluation.answers import GradedAnswer, typed
from dirl_cli.evaluation.run import explained, verdict
from dirl_cli.reward.grading import Grader
from dirl_cli.types import Problem

OURS = {field.name for field in fields(GradedAnswer)}
NEEDED = {field.name for field in fields(GradedAnswer) if field.default is MISSING}  # all that earlier versions wrote


def read_predictions(lines: Iterable[tuple[str, Mapping[str, Any]]], problems: Sequence[Problem]) -> list[GradedAnswer]:
    """The answers of (place, fields) in their order, not graded yet, those to one problem numbered as they come.

    A line has the `index` of a problem, counted from 0, and a `completion`; or it is one of our own answers.jsonl.
    Raises DirlError that names the place of the first line that is neither.
    """
    by_id = {problem.id: problem for problem in problems}
    counts, answers = Counter[str](), []
    for place, given in lines:
        if NEEDED <= given.keys() <= OURS:
            try:
                answer = typed(GradedAnswer(**given))
            except TypeError as error:
                raise DirlError(f"{place} is not an answer ({error}): correct or remove it") from error
            if answer.problem not in by_id:
                raise DirlError(f"{place} answers problem {answer.problem}, which the benchmark has not: check bench")
        else:
            index, completion = given.get("index"), given.get("completion")
            if type(index) is not int or not 0 <= index < len(problems):
                wanted = f"a whole number from 0 to {len(problems) - 1}, the place of a problem in the benchmark"
                raise DirlError(f"{place}: index must be {wanted}, {spell(given, 'index')}")
            if not isinstance(completion, str):
                raise DirlError(f"{place}: completion must be the text of an answer, {spell(given, 'completion')}")
            answer = GradedAnswer(problems[index].id, 0, completion, False, "stop", 0, 0, 0, 0, 0.0)
        answers.append(replace(explained(answer, by_id[answer.problem]), sample=counts[answer.problem]))
        counts[answer.problem] += 1
    return answers


def spell(given: Mapping[str, Any], key: str) -> str:
    return f"not {json.dumps(given[key])[:40]}" if key in given else "and is missing"


def regraded(answers: Sequence[GradedAnswer], problems: Iterable[Problem], grader: Grader) -> Iterator[GradedAnswer]:
    """The answers with their verdicts, in the order in which those are reached."""
    gold = {problem.id: problem.answer for problem in problems}
    by_key: dict[Hashable, GradedAnswer] = dict(enumerate(answers))
    for key, correct in grader.grade((key, gold[answer.problem], answer.text) for key, answer in by_key.items()):
        yield verdict(by_key[key], correct)
