"""Sudoku: puzzles of one solution or several, laid out in rows that are blocks."""

from itertools import islice, product
from random import Random

import pytest

from dirl_cli.data.arithmetic import Arithmetic
from dirl_cli.data.sudoku import Sudoku
from dirl_cli.errors import DirlError
from dirl_cli.models.tiny import train_tokenizer
from dirl_cli.reward.puzzles import is_solved, solutions_of


def brute_force(puzzle: str) -> list[str]:
    """Every filling of the blanks that keeps the rules."""
    blanks = [i for i, digit in enumerate(puzzle) if digit == "0"]
    grids = []
    for digits in product("1234", repeat=len(blanks)):
        cells = list(puzzle)
        for blank, digit in zip(blanks, digits, strict=True):
            cells[blank] = digit
        if is_solved("".join(cells)):
            grids.append("".join(cells))
    return grids


@pytest.mark.parametrize("puzzle", ["0034341221434321", "1200341221434321", "1200001221430021", "1200001221000321"])
def test_the_solver_finds_what_trying_everything_does(puzzle: str) -> None:
    assert list(solutions_of(puzzle)) == brute_force(puzzle) != []


def test_a_puzzle_that_contradicts_itself_has_no_solution() -> None:
    assert list(solutions_of("11" + "0" * 14)) == []


@pytest.mark.parametrize("blanks", [1, 8, 12])
def test_every_unique_puzzle_has_one_solution_and_as_many_blanks_as_asked(blanks: int) -> None:
    rng = Random(0)
    for _ in range(20):
        puzzle = Sudoku(blanks, blanks, unique=True).draw(rng)
        assert puzzle.question == puzzle.details["puzzle"] and puzzle.question.count("0") == blanks
        assert list(solutions_of(puzzle.question)) == [puzzle.answer] == [puzzle.response]
        assert is_solved(puzzle.answer)
        assert all(clue in ("0", digit) for clue, digit in zip(puzzle.question, puzzle.answer, strict=True))
        assert puzzle.subset == f"{blanks:02} blanks"


def test_each_number_of_blanks_is_drawn_about_as_often() -> None:
    rng = Random(1)
    drawn = [Sudoku(5, 8).draw(rng).subset for _ in range(800)]
    assert all(150 < drawn.count(f"{blanks:02} blanks") < 250 for blanks in (5, 6, 7, 8))


def test_fewer_most_blanks_than_fewest_are_refused() -> None:
    with pytest.raises(DirlError, match="the fewest blanks are 9 and the most 8: give fewest_blanks less"):
        Sudoku(9, 8)


def test_a_unique_puzzle_has_at_least_four_clues() -> None:
    with pytest.raises(DirlError, match="no Sudoku of 13 blanks has one solution alone: give most_blanks no"):
        Sudoku(9, 13, unique=True)


def test_a_puzzle_of_few_clues_has_several_solutions_of_which_the_demonstration_is_any() -> None:
    rng = Random(2)
    puzzles = [Sudoku(14, 14).draw(rng) for _ in range(200)]
    places = []
    for puzzle in puzzles:
        solutions = list(solutions_of(puzzle.question))
        assert len(solutions) > 1
        places.append(solutions.index(puzzle.response) / (len(solutions) - 1))
    assert 0.4 < sum(places) / len(places) < 0.6  # of the solutions in order, neither the first ones nor the last


def test_a_row_is_a_block_of_the_embedded_model() -> None:
    tokenizer = train_tokenizer(islice(Arithmetic().texts(), 2000))
    puzzle = Sudoku().draw(Random(0))
    turn = [{"role": "user", "content": puzzle.question}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert len(prompt) % 4 == 0
    answer = tokenizer(puzzle.answer)["input_ids"]
    blocks = [tokenizer.decode(answer[i : i + 4]) for i in range(0, len(answer), 4)]
    assert blocks == [puzzle.answer[i : i + 4] for i in range(0, 16, 4)]
