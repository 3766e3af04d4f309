"""Grids and expressions are right by the rules of their game, not by their spelling."""

import time
from itertools import product

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.reward.puzzles import (
    countdown_credit,
    expression_in,
    grid_in,
    is_solved,
    solved_grids,
    sudoku_credit,
)
from dirl_cli.types import Problem

SOLUTION = "1234341221434321"
ROWS = "1234\n3412\n2143\n4321"
PUZZLE = "0034341221434320"  # three blanks
ONE = Problem("p", PUZZLE, SOLUTION, verifier="sudoku", details={"puzzle": PUZZLE})
# Four clues of 1 and 2 say nothing of 3 and 4, which may change places.
TWO_WAYS = "1200001221000021"
LOOSE = Problem("q", TWO_WAYS, SOLUTION, verifier="sudoku", details={"puzzle": TWO_WAYS})


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        (SOLUTION, SOLUTION),
        (ROWS, SOLUTION),
        ("1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1\n", SOLUTION),
        ("| 1 | 2 | 3 | 4 |\n| 3 | 4 | 1 | 2 |\n| 2 | 1 | 4 | 3 |\n| 4 | 3 | 2 | 1 |", SOLUTION),
        (f"First {'1' * 16}, no: {SOLUTION}", SOLUTION),
        (rf"\boxed{{{SOLUTION}}} and not {'1' * 16}", SOLUTION),
        (r"\boxed{1234} " + SOLUTION, None),
        (SOLUTION[:-1], None),
        (SOLUTION + "1", None),
        (PUZZLE, None),
        ("5" + SOLUTION, None),
        ("", None),
    ],
)
def test_the_last_sixteen_digits_are_the_grid(text: str, grid: str | None) -> None:
    assert grid_in(text) == grid


@pytest.mark.parametrize("text", ["1" * 1_000_000, "1 " * 500_000, "1" + " " * 1_000_000, "1" * 15 + " " * 1_000_000])
def test_finding_the_grid_takes_linear_time(text: str) -> None:
    began = time.process_time()
    grid_in(text)
    assert time.process_time() - began < 5


def test_there_are_288_grids_of_which_each_keeps_the_rules() -> None:
    grids = solved_grids()
    assert len(grids) == len(set(grids)) == 288  # the number that is known
    assert list(grids) == sorted(grids)
    assert all(is_solved(grid) for grid in grids)
    for grid in grids[:20]:
        rows = [grid[i : i + 4] for i in range(0, 16, 4)]
        columns = ["".join(column) for column in zip(*rows, strict=True)]
        boxes = [rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r, c in product((0, 2), (0, 2))]
        assert all(set(unit) == set("1234") for unit in [*rows, *columns, *boxes])


@pytest.mark.parametrize("grid", ["1234" * 4, "1111222233334444", "1234341243212143"[::-1] + "1", SOLUTION[:12], ""])
def test_a_grid_that_breaks_a_rule_is_not_solved(grid: str) -> None:
    assert not is_solved(grid)


def changed(grid: str, **cells: str) -> str:
    """The grid with other digits, by place as in c0="2"."""
    digits = list(grid)
    for cell, digit in cells.items():
        digits[int(cell[1:])] = digit
    return "".join(digits)


@pytest.mark.parametrize(
    ("grid", "credit"),
    [
        (SOLUTION, 1),
        (changed(SOLUTION, c0="2"), 2 / 3),
        (changed(SOLUTION, c0="2", c1="1", c15="2"), 0),
        (changed(SOLUTION, c2="1"), 3 / 4),  # all blanks are right, and a clue was changed
        (changed(SOLUTION, c0="2", c2="1"), 2 / 4),
        ("2143432112343412", 0),  # solves another puzzle
    ],
)
def test_credit_is_the_share_of_blanks_that_are_filled_rightly(grid: str, credit: float) -> None:
    assert sudoku_credit(ONE, grid) == pytest.approx(credit)


def test_any_grid_that_keeps_clues_and_rules_is_right() -> None:
    other = SOLUTION.translate(str.maketrans("34", "43"))
    assert other != LOOSE.answer
    assert sudoku_credit(LOOSE, other) == 1
    assert sudoku_credit(LOOSE, changed(other, c2="3")) == pytest.approx(7 / 8)  # one blank is not as in that one


def test_credit_is_1_for_one_completion_alone_of_a_puzzle_with_one_solution() -> None:
    completions = ["".join(filling) for filling in product("1234", repeat=3)]
    credits = [sudoku_credit(ONE, changed(SOLUTION, c0=a, c1=b, c15=c)) for a, b, c in completions]
    assert credits.count(1) == 1
    assert sorted(set(credits)) == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    "details", [{}, {"puzzle": 5}, {"puzzle": "0" * 15}, {"puzzle": SOLUTION}, {"puzzle": "2" + SOLUTION[1:-1] + "0"}]
)
def test_a_problem_without_a_puzzle_and_its_solution_is_named(details: dict) -> None:
    with pytest.raises(DirlError, match="problem p is no Sudoku: give details of a puzzle of 16 digits"):
        sudoku_credit(Problem("p", "", SOLUTION, verifier="sudoku", details=details), SOLUTION)


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("(3+5)*7", "(3+5)*7"),
        ("3+5=8\n8*7=56\n(3+5)*7", "(3+5)*7"),
        ("(3+5)*7 = 56\n", "(3+5)*7"),
        (r"so \boxed{(3+5)*7}, which is 56", "(3+5)*7"),
        (r"so \boxed{(3+5)\times 7 = 56}.", r"(3+5)\times 7"),
        ("<think>7+5</think><answer>(3+5)*7</answer> is it", "(3+5)*7"),
        ("<answer>1</answer><answer>\n(3+5)*7\n</answer>", "(3+5)*7"),
        ("$(3+5)*7$.", "(3+5)*7"),
        ("=", None),
        (r"\boxed{}", None),
        (" \n ", None),
        ("", None),
    ],
)
def test_the_expression_is_in_the_box_or_the_tag_or_the_last_line(text: str, expression: str | None) -> None:
    assert expression_in(text) == expression


@pytest.mark.parametrize("text", ["<answer>" * 100_000, "<answer>" + "x" * 1_000_000, "</answer>" * 100_000])
def test_finding_the_expression_takes_linear_time(text: str) -> None:
    began = time.process_time()
    expression_in(text)
    assert time.process_time() - began < 5


GAME = Problem("g", "3 5 7 = 56", "(3+5)*7", verifier="countdown", details={"numbers": [3, 5, 7], "target": 56})
TWICE = Problem("t", "3 3 8 8 = 24", "8/(3-8/3)", verifier="countdown", details={"numbers": [3, 3, 8, 8], "target": 24})


@pytest.mark.parametrize(
    ("expression", "credit"),
    [
        ("(3+5)*7", 1),
        ("7*(5+3)", 1),
        ("7*5+7*3", 0),  # 56, but a 7 too many
        ("56", 0),
        ("3+5+7", 0.1),
        ("(3+5)*7+0", 0),
        ("(3+5)*7/1", 0),
        ("5*7", 0),
        ("35+7", 0),
        ("3*5/(7-7)", 0),
        ("the sum", 0),
    ],
)
def test_an_expression_is_right_that_uses_each_number_once_and_reaches_the_target(
    expression: str, credit: float
) -> None:
    assert countdown_credit(GAME, expression) == credit


def test_fractions_on_the_way_are_exact_and_equal_numbers_count_each() -> None:
    assert countdown_credit(TWICE, "8/(3-8/3)") == 1
    assert countdown_credit(TWICE, "8*3") == 0


@pytest.mark.parametrize(
    "details", [{}, {"numbers": [3, 5]}, {"numbers": "35", "target": 8}, {"numbers": [3, 5.0], "target": 8}]
)
def test_a_problem_without_numbers_and_target_is_named(details: dict) -> None:
    with pytest.raises(DirlError, match="problem g is no Countdown: give details of its numbers"):
        countdown_credit(Problem("g", "", "8", verifier="countdown", details=details), "3+5")
