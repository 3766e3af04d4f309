"""Verify answers to puzzles by their rules: a grid of Sudoku, an expression of Countdown."""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.reward.boxed import last_boxed
from dirl_cli.reward.expressions import evaluate
from dirl_cli.types import Problem

SIDE = 4
CELLS = SIDE * SIDE
DIGITS = "1234"
BLANK = "0"
BETWEEN = r"[\s|,;]*"  # what may stand between the cells of a grid
GRID = re.compile(rf"(?<![0-9])[1-4](?:{BETWEEN}[1-4]){{{CELLS - 1}}}(?![0-9])")
PUZZLE = re.compile(rf"[0-4]{{{CELLS}}}")

TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
MISSED = 0.1  # for the right numbers that miss the target, as TinyZero gives for its format


# Sudoku of four rows, columns and boxes: a grid is its cells, row by row, as a text of sixteen digits.


def grid_in(completion: str) -> str | None:
    """The last grid of a completion, or of its last box if it has one: sixteen digits from 1 to 4, in any layout."""
    text = last_boxed(completion)
    grids = GRID.findall(completion if text is None else text)
    return re.sub(BETWEEN, "", grids[-1]) if grids else None


def sudoku_credit(problem: Problem, grid: str) -> float:
    """1 for a grid that keeps the clues and the rules, else the share of the blanks filled as in the nearest solution.

    A clue that was changed counts like a further blank that is filled wrongly. Where the clues leave one solution
    alone, the share is the reward of d1 (arXiv 2504.12216), which leaves clues out.
    """
    puzzle = puzzle_of(problem)
    changed = changed_clues(puzzle, grid)
    if is_solved(grid) and not changed:
        return 1.0
    blanks = [i for i, clue in enumerate(puzzle) if clue == BLANK]
    right = max(sum(grid[i] == solution[i] for i in blanks) for solution in solutions_of(puzzle))
    return right / (len(blanks) + changed)


def puzzle_of(problem: Problem) -> str:
    """The clues of a Sudoku, 0 for each blank. Raises DirlError where the problem holds no puzzle and solution."""
    puzzle: Any = problem.details.get("puzzle")
    is_puzzle = isinstance(puzzle, str) and PUZZLE.fullmatch(puzzle) and BLANK in puzzle
    if not is_puzzle or not is_solved(problem.answer) or changed_clues(puzzle, problem.answer):
        raise DirlError(
            f"problem {problem.id} is no Sudoku: give details of a puzzle of 16 digits, 0 for a blank, and its solution"
        )
    return str(puzzle)


def changed_clues(puzzle: str, grid: str) -> int:
    """How many cells of a grid differ from a clue of the puzzle."""
    return sum(clue not in (BLANK, cell) for clue, cell in zip(puzzle, grid, strict=True))


def is_solved(grid: str) -> bool:
    """Whether every row, column and box holds each of the digits 1 to 4."""
    return len(grid) == CELLS and all(sorted(grid[i] for i in unit) == list(DIGITS) for unit in units())


def solutions_of(puzzle: str) -> Iterator[str]:
    """Every solved grid that keeps the clues: of the 288 there are, those in each clue's set."""
    fitting = (1 << len(solved_grids())) - 1
    for cell, clue in enumerate(puzzle):
        if clue != BLANK:
            fitting &= grids_with()[cell, clue]
    for i, grid in enumerate(solved_grids()):
        if fitting >> i & 1:
            yield grid


@lru_cache(maxsize=1)
def grids_with() -> dict[tuple[int, str], int]:
    """For each cell and digit the solved grids that have it there, as a set of bits by their place in the list."""
    sets: dict[tuple[int, str], int] = {}
    for i, grid in enumerate(solved_grids()):
        for cell, digit in enumerate(grid):
            sets[cell, digit] = sets.get((cell, digit), 0) | 1 << i
    return sets


@lru_cache(maxsize=1)
def units() -> tuple[tuple[int, ...], ...]:
    """The cells of every row, column and box, as places in the text of a grid."""
    lines = range(SIDE)
    rows = [tuple(SIDE * row + column for column in lines) for row in lines]
    columns = [tuple(SIDE * row + column for row in lines) for column in lines]
    corners = (0, 2, 8, 10)
    boxes = [(corner, corner + 1, corner + SIDE, corner + SIDE + 1) for corner in corners]
    return (*rows, *columns, *boxes)


@lru_cache(maxsize=1)
def solved_grids() -> tuple[str, ...]:
    """All 288 grids that keep the rules, in order."""
    return tuple(extended(""))


def extended(beginning: str) -> Iterator[str]:
    """The solved grids that begin with these whole rows, none of whose columns or boxes holds a digit twice."""
    if len(beginning) == CELLS:
        yield beginning
        return
    for row in permutations(DIGITS):
        grid = beginning + "".join(row)
        if not any(has_repeats([grid[i] for i in unit if i < len(grid)]) for unit in units()):
            yield from extended(grid)


def has_repeats(values: list[str]) -> bool:
    return len(set(values)) < len(values)


# Countdown: reach a target by + - * / from some numbers, each used exactly once, as in TinyZero and d1.


def expression_in(completion: str) -> str | None:
    """What a completion gives for its expression: its last box, its last <answer>…</answer>, or its last line.

    Of an equation it is the left side.
    """
    text = last_boxed(completion)
    if text is None:
        tagged = TAGGED.findall(completion)
        lines = completion.strip().splitlines()
        text = tagged[-1] if tagged else lines[-1] if lines else ""
    expression = text.partition("=")[0].strip(" \n\t$.")
    return expression or None


def countdown_credit(problem: Problem, expression: str) -> float:
    """1 for an expression of the target that uses each number exactly once, 0.1 if it misses the target, else 0."""
    numbers, target = countdown_of(problem)
    evaluated = evaluate(expression)
    if evaluated is None:
        return 0.0
    value, used = evaluated
    if sorted(used) != sorted(numbers):
        return 0.0
    return 1.0 if value == target else MISSED


def countdown_of(problem: Problem) -> tuple[list[int], int]:
    """The numbers and the target of a game. Raises DirlError where the problem does not hold them."""
    numbers: Any = problem.details.get("numbers")
    target: Any = problem.details.get("target")
    if not isinstance(numbers, list) or not all(type(number) is int for number in [*numbers, target]):
        raise DirlError(f"problem {problem.id} is no Countdown: give details of its numbers, a list, and its target")
    return numbers, target
