"""Sudoku of four rows: puzzles with one solution, and the solver that tells."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Annotated

from dirl_cli.data.arithmetic import pick
from dirl_cli.data.embedded import Puzzle
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Range
from dirl_cli.reward.puzzles import BLANK, CELLS, solved_grids

Blanks = Annotated[int, Range(at_least=1, at_most=12)]  # fewer than four clues never leave one solution alone


@dataclass(frozen=True)
class Sudoku:
    """Grids of 4×4 digits with blanks, each of one solution. The question is the puzzle, row by row, 0 for a blank.

    A row is four tokens, of a question as of an answer: a block of 4 is a row, whose cells are filled in any order.
    fewest_blanks, most_blanks: how many cells are blank, each number as often.
    """

    fewest_blanks: Blanks = 6
    most_blanks: Blanks = 10
    verifier = "sudoku"

    def __post_init__(self) -> None:
        if self.fewest_blanks > self.most_blanks:
            raise DirlError(
                f"the fewest blanks are {self.fewest_blanks} and the most {self.most_blanks}: give fewest_blanks less"
            )

    def draw(self, rng: Random) -> Puzzle:
        """A solved grid with cells blanked at random, drawn anew until no other grid fits the clues."""
        blanks = pick(rng, range(self.fewest_blanks, self.most_blanks + 1))
        while True:
            solution = pick(rng, solved_grids())
            puzzle = blank_out(rng, solution, blanks)
            if len(list(solutions_of(puzzle))) == 1:
                break
        return Puzzle(puzzle, puzzle, solution, solution, f"{blanks:02} blanks", {"puzzle": puzzle})


def blank_out(rng: Random, grid: str, blanks: int) -> str:
    """The grid with so many of its cells blank."""
    cells = list(grid)
    clues = list(range(CELLS))
    for _ in range(blanks):
        cell = pick(rng, clues)
        clues.remove(cell)
        cells[cell] = BLANK
    return "".join(cells)


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
