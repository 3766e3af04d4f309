"""How answers are verified: by mathematics, by the rules of what a problem is, or by tests."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.reward.boxed import final_answer, reference
from dirl_cli.reward.choices import choice_credit, choice_in
from dirl_cli.reward.custom_scorer import find_scorer, own_credit, whole_completion
from dirl_cli.reward.equality import plainly_equal, verified
from dirl_cli.reward.functions import is_import_path
from dirl_cli.reward.gym import gym_answer_in, gym_credit, load_gym
from dirl_cli.reward.program_runner import start_program_server
from dirl_cli.reward.programs import program_credit, program_in
from dirl_cli.reward.puzzles import countdown_credit, expression_in, grid_in, sudoku_credit
from dirl_cli.reward.short_text import text_credit, text_in
from dirl_cli.types import Problem

RIGHT_OR_WRONG = ("math", "choice", "text")  # verifiers that give an answer all of the credit or none
LONGEST_ANSWER = 2000  # characters; no reference answer comes near, and parsing time grows faster than length


def nothing_to_load() -> None:
    """For verifiers that import nothing late."""


@dataclass(frozen=True)
class Verifier:
    """Gives an answer credit from 0 to 1; 1 is right.

    extract: the final answer in a completion, None where there is none, which has no credit.
    credit: of a problem and a final answer; it may hang or eat memory, and runs in a process that may be killed.
    quick: the same at once, whatever the text; None where that takes `credit`.
    load: imports what `credit` needs, which takes no answer's time.
    """

    extract: Callable[[str], str | None]
    credit: Callable[[Problem, str], float]
    quick: Callable[[Problem, str], float | None]
    load: Callable[[], object] = nothing_to_load


def plain_math_credit(problem: Problem, answer: str) -> float | None:
    """Whether an answer is the reference where that is plain; None where it takes math-verify."""
    verdict = plainly_equal(reference(problem.answer), answer)
    if verdict is None and len(answer) <= LONGEST_ANSWER:
        return None
    return float(bool(verdict))


def math_credit(problem: Problem, answer: str) -> float:
    """Whether math-verify takes an answer for the reference."""
    return float(verified(reference(problem.answer), answer))


def bounded_choice_credit(problem: Problem, answer: str) -> float:
    """As `choice_credit`; a text longer than any answer has no credit."""
    return choice_credit(problem, answer) if len(answer) <= LONGEST_ANSWER else 0.0


def never_quick(problem: Problem, answer: str) -> None:
    """Nothing: scorers of others may hang, so they run where they can be killed."""


VERIFIERS: dict[str, Verifier] = {
    "math": Verifier(final_answer, math_credit, plain_math_credit),
    "choice": Verifier(choice_in, bounded_choice_credit, bounded_choice_credit),
    "text": Verifier(text_in, text_credit, text_credit),
    "sudoku": Verifier(grid_in, sudoku_credit, sudoku_credit),
    "countdown": Verifier(expression_in, countdown_credit, countdown_credit),
    "gym": Verifier(gym_answer_in, gym_credit, never_quick, load_gym),
    "code": Verifier(program_in, program_credit, never_quick, start_program_server),
}


def verifier_of(problem: Problem) -> Verifier:
    """The verifier that a problem names, built in or a scorer of the user's own by import path.

    Raises DirlError where there is none of that name.
    """
    if is_import_path(problem.verifier):
        return custom_verifier(problem.verifier)
    if problem.verifier not in VERIFIERS:
        hint = did_you_mean(problem.verifier, VERIFIERS)
        raise DirlError(f"problem {problem.id}: no verifier is called {problem.verifier}: {hint}")
    return VERIFIERS[problem.verifier]


@cache
def custom_verifier(name: str) -> Verifier:
    """The scorer of an import path as a verifier. It runs in the grading processes, as it may hang or eat memory."""
    return Verifier(whole_completion, own_credit, never_quick, partial(find_scorer, name))


def has_votes(problem: Problem) -> bool:
    """Whether right answers to a problem are spelled alike, so that they can be counted (maj@k).

    Programs are not, nor whole completions, of which a scorer of the user's own makes something that nobody else knows.
    """
    return problem.verifier != "code" and not is_import_path(problem.verifier)


def gives_parts(problem: Problem) -> bool:
    """Whether an answer to a problem may have a part of the credit."""
    return problem.verifier not in RIGHT_OR_WRONG
