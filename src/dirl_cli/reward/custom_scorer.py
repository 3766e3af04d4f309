"""Score answers by a function of the user's own: from a problem and the text of an answer to a number from 0 to 1."""

import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.reward.functions import find_function, source_digest
from dirl_cli.types import Problem

Scorer = Callable[[Problem, str], Any]
"""From a problem, whose `details` are its row's other columns, and a completion to a number from 0 to 1."""


def whole_completion(completion: str) -> str | None:
    """All of a completion, thoughts included; None where it is empty, which has no credit."""
    return completion if completion.strip() else None


@cache
def find_scorer(name: str) -> Scorer:
    """The scorer of that import path. Raises DirlError where there is none, or where its code cannot be loaded."""
    return find_function(name, "scorer")


def scorer_digest(name: str) -> str:
    """A digest of the file that the scorer of that import path is in. Raises as `find_scorer`, which runs it once."""
    find_scorer(name)
    return source_digest(name)


def own_credit(problem: Problem, completion: str) -> float:
    """What the scorer that the problem names gives. Raises DirlError where it fails or gives no number from 0 to 1.

    A scorer that fails is one to correct: to count the answer as wrong would hide it.
    """
    try:
        value = find_scorer(problem.verifier)(problem, completion)
    except (DirlError, MemoryError, RecursionError):
        raise
    except (Exception, SystemExit) as error:  # it may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename} line {frame.lineno}"
        raise scorer_error(problem, f"raised {type(error).__name__}: {error} ({place})") from error
    try:
        if isinstance(value, str | bytes | bytearray):  # '1' is none, though `float` reads it
            raise TypeError
        credit = float(value)
    except OverflowError as error:
        raise scorer_error(problem, "gave a number too large for a float, which is not from 0 to 1") from error
    except (TypeError, ValueError) as error:
        raise scorer_error(problem, f"gave {value!r:.40}, which is no number from 0 to 1") from error
    if not 0 <= credit <= 1:  # nan neither
        raise scorer_error(problem, f"gave {credit:g}, which is not from 0 to 1")
    return credit


def scorer_error(problem: Problem, what: str) -> DirlError:
    return DirlError(
        f"the scorer {problem.verifier} {what} on problem {problem.id}: correct it, and give the same command again"
    )
