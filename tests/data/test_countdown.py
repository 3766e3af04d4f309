"""Countdown: targets that the numbers reach, each with an expression and its steps."""

from fractions import Fraction
from itertools import combinations, permutations
from random import Random

import pytest

from dirl_cli.data.countdown import Computed, Countdown, computation, targets_of, written
from dirl_cli.errors import DirlError
from dirl_cli.reward.expressions import evaluate


def reachable(numbers: list[int]) -> set[int]:
    """Every target that can be had by joining two numbers again and again, whole and above 0 all the way."""
    if len(numbers) == 1:
        return set(numbers)
    targets = set()
    for i, j in combinations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for a, b in permutations([numbers[i], numbers[j]]):
            for value in (Fraction(a + b), Fraction(a - b), Fraction(a * b), Fraction(a, b)):
                if value > 0 and value.denominator == 1:
                    targets |= reachable([*rest, int(value)])
    return targets


@pytest.mark.parametrize("numbers", [(5,), (3, 3), (2, 4, 8), (1, 7, 7), (9, 9, 9), (1, 2, 3, 4), (3, 5, 7, 9)])
def test_the_solver_reaches_what_trying_everything_does(numbers: tuple[int, ...]) -> None:
    assert targets_of(numbers).keys() == reachable(list(numbers))


@pytest.mark.parametrize("numbers", [(2, 4, 8), (1, 2, 3, 4), (3, 5, 7, 9)])
def test_every_expression_has_its_value_and_uses_each_number_once(numbers: tuple[int, ...]) -> None:
    for target, way in targets_of(numbers).items():
        value, used = evaluate(written(way))
        assert value == target and sorted(used) == list(numbers)


def test_brackets_stand_where_they_are_needed_and_nowhere_else() -> None:
    one, two, three = Computed(1), Computed(2), Computed(3)
    total = Computed(3, "+", one, two)
    assert written(Computed(9, "*", three, total)) == "3*(1+2)"
    assert written(Computed(9, "*", total, three)) == "(1+2)*3"
    assert written(Computed(6, "+", three, total)) == "3+1+2"
    assert written(Computed(0, "-", three, total)) == "3-(1+2)"
    product = Computed(6, "*", two, three)
    assert written(Computed(1, "/", Computed(6), product)) == "6/(2*3)"
    assert written(Computed(6, "*", one, product)) == "1*2*3"
    assert written(Computed(5, "-", product, one)) == "2*3-1"


def test_steps_are_true_and_end_in_the_expression() -> None:
    rng = Random(0)
    for _ in range(200):
        puzzle = Countdown(numbers=4).draw(rng)
        *lines, expression = puzzle.response.split("\n")
        assert len(lines) == 3 and expression == puzzle.answer
        for line in lines:
            left, right = line.split("=")
            assert evaluate(left)[0] == int(right)
        assert int(lines[-1].split("=")[1]) == puzzle.details["target"]
    assert computation(Computed(5)) == ""


def test_the_question_holds_numbers_and_target_within_their_bounds() -> None:
    rng = Random(0)
    game = Countdown(numbers=3, largest_number=12, smallest_target=20, largest_target=30, steps=False)
    puzzles = [game.draw(rng) for _ in range(300)]
    for puzzle in puzzles:
        numbers, target = puzzle.details["numbers"], puzzle.details["target"]
        assert puzzle.question == f"{numbers[0]} {numbers[1]} {numbers[2]} = {target}"
        assert all(1 <= number <= 12 for number in numbers) and 20 <= target <= 30
        assert puzzle.response == puzzle.answer
        value, used = evaluate(puzzle.answer)
        assert value == target and sorted(used) == sorted(numbers)
    assert {puzzle.details["target"] for puzzle in puzzles} == set(range(20, 31))
    assert any(puzzle.details["numbers"] != sorted(puzzle.details["numbers"]) for puzzle in puzzles)


def test_a_game_of_fewer_operators_is_reached_by_these_alone() -> None:
    rng = Random(0)
    answers = [Countdown(largest_number=20, operators="+-").draw(rng).answer for _ in range(200)]
    assert set("".join(answers)) - set("0123456789") == set("+-")
    assert targets_of((2, 3, 7), "+-").keys() == {2, 6, 8, 12}


def test_targets_out_of_reach_are_not_looked_for_endlessly() -> None:
    with pytest.raises(DirlError, match=r"2 numbers from 1 to 3 reach no target from 50 to 60 by \+-\*/: widen"):
        Countdown(numbers=2, largest_number=3, smallest_target=50, largest_target=60).draw(Random(0))
