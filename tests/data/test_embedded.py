"""Splits of embedded puzzles: disjoint, seeded, and as large as there are puzzles."""

from dataclasses import replace

import pytest

from dirl_cli.data.countdown import Countdown
from dirl_cli.data.embedded import Puzzles, draw_puzzles
from dirl_cli.data.sudoku import Sudoku
from dirl_cli.errors import DirlError

SUDOKU = Puzzles("sudoku", Sudoku(), train=500, held_out=50, test=100)
COUNTDOWN = Puzzles("countdown", Countdown(), train=500, held_out=50, test=100)


@pytest.mark.parametrize("puzzles", [SUDOKU, COUNTDOWN])
def test_no_puzzle_is_in_two_splits_or_twice_in_one(puzzles: Puzzles) -> None:
    splits = draw_puzzles(puzzles.game, 500, 50, 100, 0)
    keys = [puzzle.key for split in splits for puzzle in split]
    assert [len(split) for split in splits] == [100, 50, 500]
    assert len(set(keys)) == len(keys)


def test_the_same_numbers_in_another_order_are_the_same_countdown() -> None:
    problems = COUNTDOWN.training_problems() + COUNTDOWN.problems()
    games = [(sorted(problem.details["numbers"]), problem.details["target"]) for problem in problems]
    assert all(games.count(game) == 1 for game in games)


@pytest.mark.parametrize("puzzles", [SUDOKU, COUNTDOWN])
def test_the_test_puzzles_stay_when_the_training_set_grows(puzzles: Puzzles) -> None:
    assert replace(puzzles, train=50).problems() == puzzles.problems()


@pytest.mark.parametrize("puzzles", [SUDOKU, COUNTDOWN])
def test_another_seed_gives_other_puzzles(puzzles: Puzzles) -> None:
    questions = {problem.question for problem in puzzles.problems()}
    others = {problem.question for problem in replace(puzzles, seed=1).problems()}
    assert len(questions & others) < 20


def test_the_same_seed_gives_the_same_puzzles_everywhere() -> None:
    assert SUDOKU.problems()[0].question == "2000040040000000"
    assert COUNTDOWN.problems()[0].question == "7 4 3 = 17"


def test_problems_say_how_they_are_verified_and_demonstrations_hold_their_answers() -> None:
    for puzzles in (SUDOKU, COUNTDOWN):
        problems = puzzles.training_problems()
        assert {problem.verifier for problem in problems} == {puzzles.name}
        for problem, row in zip(problems, puzzles.demonstrations(), strict=True):
            user, assistant = row.fields["messages"]
            assert user == {"role": "user", "content": problem.question}
            assert assistant["content"].endswith(problem.answer)
        assert len(puzzles.validation()) == 50


def test_more_puzzles_than_there_are_are_refused_with_how_many_there_are() -> None:
    easy = Puzzles("sudoku", Sudoku(1, 1), train=10_000, held_out=0, test=100)
    with pytest.raises(
        DirlError, match=r"sudoku has no 10,000 puzzles for train, only 4,\d\d\d as hard as that: lower"
    ):
        easy.demonstrations()
    assert len(easy.problems()) == 100
