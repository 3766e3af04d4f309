"""Credits of sampled answers that nobody has graded: the main process grades them, and a run keeps what it gave.

A comparison may end in time or not. So that all processes, and all starts of a run, learn from the same answers, each
is graded once.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dirl_cli.errors import DirlError
from dirl_cli.files import write_json
from dirl_cli.reward.custom_scorer import scorer_digest
from dirl_cli.reward.functions import is_import_path
from dirl_cli.reward.grading import Credit, Grader
from dirl_cli.types import Problem

CREDITS = "credits.json"  # in the directory of a run

Attempt = tuple[Problem, str]  # a problem, and the text of an answer to it
Grade = Callable[[Sequence[Attempt]], list[Credit]]


def grade(attempts: Sequence[Attempt]) -> list[Credit]:
    """The credit of each; None for one that takes too long or too much memory."""
    with Grader() as grader:
        credits = dict(grader.credits((i, problem, text) for i, (problem, text) in enumerate(attempts)))
    return [credits[i] for i in range(len(attempts))]


def grade_once(attempts: Sequence[Attempt], file: Path | None, accelerator: Accelerator) -> list[Credit]:
    """As `grade`, by the main process for all.

    file: what earlier starts gave, to which the rest is added; None keeps nothing.
    """
    if not attempts:
        return []
    credits: list[list[Credit]] = [[]]
    if accelerator.is_main_process:
        known = read_credits(file) if file else {}
        keys = [digest(problem, text) for problem, text in attempts]
        missing = {key: attempt for key, attempt in zip(keys, attempts, strict=True) if key not in known}
        known |= zip(missing, grade(list(missing.values())), strict=True)
        if file and missing:
            write_json(file, known)
        credits = [[known[key] for key in keys]]
    broadcast_object_list(credits)
    return credits[0]


def read_credits(file: Path) -> dict[str, Credit]:
    """The credits in a file by the digests of what they are of. Raises DirlError where it holds anything else."""
    if not file.exists():
        return {}
    try:
        known: dict[str, Credit] = json.loads(file.read_bytes())
        if not all(credit is None or 0 <= credit <= 1 for credit in known.values()):
            raise ValueError("a credit is from 0 to 1")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DirlError(f"{file} holds no credits of answers: remove it, and they are graded again") from error
    return known


def digest(problem: Problem, text: str) -> str:
    """A SHA-256 that changes with anything that the credit of an answer depends on."""
    asked: list[object] = [problem.question, problem.answer, problem.verifier, problem.details, text]
    if is_import_path(problem.verifier):
        asked.append(scorer_digest(problem.verifier))
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
