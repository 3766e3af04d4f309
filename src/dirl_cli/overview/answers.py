"""Some of a run's answers, to be read: from the first and last steps, or right and wrong ones of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirl_cli.line_files import step_files
from dirl_cli.overview.files import read_objects

LOOKED_AT = 400  # answers of a file, from which some are chosen
PROBLEMS = 4  # that are shown of a step
OF_EACH = 6  # right and wrong answers that are shown of an evaluation
LONGEST = 4000  # letters that are shown of a text


@dataclass(frozen=True)
class AnswerExcerpt:
    """An answer as it is shown. facts: what is known of it in a few words."""

    question: str
    reference: str
    text: str
    is_correct: bool
    facts: str


def answers_to_read(run: Path) -> dict[str, list[AnswerExcerpt]]:
    """Answers to look at, under headings; nothing where the run kept none."""
    files = step_files(run / "rollouts")
    steps = list(files)
    shown = {}
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        answers = of_some_problems(read_objects(files[step], LOOKED_AT))
        if answers:
            shown[f"Step {step}"] = answers
    rows = read_objects(run / "answers.jsonl", LOOKED_AT)
    for heading, is_correct in (("Wrong", False), ("Right", True)):
        chosen = [excerpt(row) for row in rows if bool(row.get("correct")) == is_correct][:OF_EACH]
        if chosen:
            shown[heading] = chosen
    return shown


def of_some_problems(rows: Sequence[Mapping[str, Any]]) -> list[AnswerExcerpt]:
    """A right and a wrong answer, as far as there are such, to the first problems."""
    by_problem: dict[str, dict[bool, AnswerExcerpt]] = {}
    for row in rows:
        answers = by_problem.setdefault(str(row.get("problem")), {})
        answer = excerpt(row)
        answers.setdefault(answer.is_correct, answer)
    return [answer for answers in list(by_problem.values())[:PROBLEMS] for answer in answers.values()]


def excerpt(row: Mapping[str, Any]) -> AnswerExcerpt:
    """A line of a rollout or of an evaluation."""
    facts = []
    for name in ("reward", "credit", "advantage"):
        if isinstance(row.get(name), int | float):
            facts.append(f"{name} {row[name]:.3g}")
    for name in ("length", "forwards"):
        if isinstance(row.get(name), int):
            facts.append(f"{name} {row[name]}")
    if row.get("stop_reason") == "length":
        facts.append("cut at the longest")
    return AnswerExcerpt(
        question=shortened_text(row.get("question")),
        reference=shortened_text(row.get("reference", row.get("answer"))),
        text=shortened_text(row.get("completion", row.get("text"))),
        is_correct=bool(row.get("correct")),
        facts=", ".join(facts),
    )


def shortened_text(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} letters)"
