"""Score answers to tasks of reasoning-gym by the tasks' own rules, with partial credit."""

import json
import re
from functools import lru_cache
from typing import Any

from dirl_cli.errors import DirlError, did_you_mean, pip_install
from dirl_cli.reward.boxed import last_boxed
from dirl_cli.reward.puzzles import TAGGED
from dirl_cli.types import Problem

END_OF_THOUGHT = "</think>"

# Scorers of these evaluate an answer as Python. Nothing is called in a text without brackets; one with brackets may
# hold numbers, operators, lists, quoted characters, and as words letters and functions of mathematics. A longer text in
# quotes is left out: sympy's functions would evaluate it in turn.
EVALUATED = {
    "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
    "simple_integration", "spiral_matrix", "string_insertion",
}  # fmt: skip

# Their questions depend on the order of Python's sets or on the clock (0.1.25): another process makes others of a seed,
# so that no run could go on with them, nor two processes share one.
UNREPEATABLE = {
    "codeio", "intermediate_integration", "isomorphic_strings", "knight_swap", "list_functions",
    "polynomial_multiplication", "ransom_note", "word_ladder",
}  # fmt: skip
FUNCTIONS = "sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|pi"
HARMLESS = re.compile(rf"""(?:[\s\d+\-*/^()\[\],.!=]|'[^'\\]'|"[^"\\]"|\b(?:[A-Za-z]|{FUNCTIONS})(?![A-Za-z_]))*+""")


def gym_answer_in(completion: str) -> str | None:
    """The last `<answer>…</answer>` of a completion, or its last box, or all that follows its thought."""
    tagged = TAGGED.findall(completion)
    if tagged:
        return str(tagged[-1]).strip()
    boxed = last_boxed(completion)
    if boxed is not None:
        return boxed.strip()
    return completion.rpartition(END_OF_THOUGHT)[2].strip() or None


def gym_credit(problem: Problem, answer: str) -> float:
    """What the task's scorer gives an answer, from 0 to 1."""
    details = problem.details
    if not isinstance(details.get("task"), str) or type(details.get("seed")) is not int:
        raise DirlError(f"problem {problem.id} is of no task of reasoning-gym: give details of its task, options, seed")
    entry = entry_of(details)
    if entry["question"] != problem.question:
        raise DirlError(f"problem {problem.id} was made by another version of reasoning-gym than the one that is here")
    if details["task"] in EVALUATED and "(" in answer and not HARMLESS.fullmatch(answer):
        return 0.0
    scorer = task_of(details)
    try:
        score = scorer.score_answer(answer, entry)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # a scorer that cannot read an answer raises anything
        score = 0.0
    return min(max(float(score), 0.0), 1.0)


def entry_of(details: dict[str, Any]) -> dict[str, Any]:
    """The question, answer and metadata that a task makes of a seed."""
    entry: dict[str, Any] = task_of(details)[0]
    return entry


def task_of(details: dict[str, Any]) -> Any:
    """The data set of one question, a `ProceduralDataset`."""
    return cached_task(details["task"], json.dumps(details.get("options") or {}, sort_keys=True), details["seed"])


@lru_cache(maxsize=64)
def cached_task(task: str, options: str, seed: int) -> Any:
    return task_named(task, json.loads(options), seed=seed, size=1)


def task_named(task: str, options: dict[str, Any], **placing: int) -> Any:
    """The task with its options. Raises DirlError for names and options that there are not, and without the package."""
    datasets, create_dataset = load_gym()
    if task in UNREPEATABLE:
        raise DirlError(f"{task} makes other questions of a seed in every process: choose another task")
    if task not in datasets:
        raise DirlError(f"reasoning-gym has no task {task}: {did_you_mean(task, datasets)}")
    try:
        return create_dataset(task, **options, **placing)
    except TypeError as error:
        valid = [name for name in datasets[task][1].__dataclass_fields__ if name not in ("seed", "size")]
        unknown = [name for name in options if name not in valid]
        if not unknown:
            raise DirlError(f"{task} with {options}: {error}") from error
        raise DirlError(f"{task} has no option {unknown[0]}; {did_you_mean(unknown[0], valid)}") from error
    except (AssertionError, ValueError) as error:
        raise DirlError(f"{task} with {options}: {error}") from error


def load_gym() -> tuple[dict[str, Any], Any]:
    """What reasoning-gym has by name, and what makes it. Raises DirlError without the package."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        remedy = pip_install("gym")
        raise DirlError(f"tasks of reasoning-gym need the package, which is not installed: {remedy}") from error
    return DATASETS, create_dataset
