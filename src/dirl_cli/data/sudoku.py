"""Sudoku of four rows: puzzles whose clues leave one solution alone, or several."""

from dataclasses import dataclass
from random import Random
from typing import Annotated

from dirl_cli.data.arithmetic import pick
from dirl_cli.data.embedded import Puzzle
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Range
from dirl_cli.reward.puzzles import BLANK, CELLS, solutions_of, solved_grids

MOST_OF_UNIQUE = 12  # fewer than four clues never leave one solution alone
Blanks = Annotated[int, Range(at_least=1, at_most=CELLS)]


@dataclass(frozen=True)
class Sudoku:
    """Grids of 4×4 digits with blanks. The question is the puzzle, row by row, 0 for a blank.

    A row is four tokens, of a question as of an answer: a block of 4 is a row, whose cells are filled in any order.
    fewest_blanks, most_blanks: how many cells are blank, each number as often.
    unique: draw only puzzles of one solution; otherwise a demonstration is one of those that fit, each as often.
    """

    fewest_blanks: Blanks = 9
    most_blanks: Blanks = 14
    unique: bool = False
    verifier = "sudoku"

    def __post_init__(self) -> None:
        if self.fewest_blanks > self.most_blanks:
            raise DirlError(
                f"the fewest blanks are {self.fewest_blanks} and the most {self.most_blanks}: give fewest_blanks less"
            )
        if self.unique and self.most_blanks > MOST_OF_UNIQUE:
            raise DirlError(
                f"no Sudoku of {self.most_blanks} blanks has one solution alone:"
                f" give most_blanks no more than {MOST_OF_UNIQUE}, or unique=false"
            )

    def draw(self, rng: Random) -> Puzzle:
        """A solved grid with cells blanked at random, if unique drawn anew until no other grid fits the clues."""
        blanks = pick(rng, range(self.fewest_blanks, self.most_blanks + 1))
        while True:
            solution = pick(rng, solved_grids())
            puzzle = blank_out(rng, solution, blanks)
            if not self.unique or len(list(solutions_of(puzzle))) == 1:
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
