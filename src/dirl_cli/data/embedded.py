"""Embedded puzzles in disjoint splits, drawn from a seed: what is common to Sudoku and Countdown."""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random
from typing import Annotated, Any, NamedTuple, Protocol

from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Natural, OneOf, Seed
from dirl_cli.types import Problem

TIRED = 2_000  # draws in a row of puzzles that were drawn before, after which there are taken to be no others


@dataclass(frozen=True)
class Puzzle:
    """A puzzle with one right answer to it.

    key: what two puzzles share that are the same, however they are put. response: a demonstration of the answer.
    subset: how hard it is, in words. details: what its verifier needs.
    """

    key: str
    question: str
    answer: str
    response: str
    subset: str
    details: dict[str, Any] = field(default_factory=dict)


class Game(Protocol):
    """A kind of puzzle, as difficult as its fields say. verifier: a name of reward/verifiers.py."""

    @property
    def verifier(self) -> str: ...
    def __hash__(self) -> int: ...
    def draw(self, rng: Random) -> Puzzle: ...


class PuzzleSplits(NamedTuple):
    test: list[Puzzle]
    validation: list[Puzzle]
    train: list[Puzzle]


@dataclass(frozen=True)
class Puzzles:
    """Puzzles of a game with solutions, drawn from `seed`; none is in two of the three splits.

    train, held_out, test: puzzles per split. The test puzzles depend on the game, `seed` and `test` alone.
    split: what `problems` gives: train, validation or test.
    """

    name: str
    game: Any  # a Game; OmegaConf knows no protocols
    train: Natural = 20_000
    held_out: Natural = 300
    test: Natural = 1_000
    seed: Seed = 0
    split: Annotated[str, OneOf("train", "validation", "test")] = "test"

    def demonstrations(self) -> list[Row]:
        """The training puzzles with their solutions, as messages."""
        return self._messages("train")

    def validation(self) -> list[Row]:
        """The `held_out` demonstrations, none of which is trained on."""
        return self._messages("validation")

    def problems(self) -> list[Problem]:
        """The puzzles of `split`; the subset says how hard one is."""
        return [
            Problem(
                id=f"{self.split}-{i}",
                question=puzzle.question,
                answer=puzzle.answer,
                subset=puzzle.subset,
                verifier=self.game.verifier,
                details=puzzle.details,
                solution=puzzle.response,
            )
            for i, puzzle in enumerate(self._puzzles(self.split))
        ]

    def training_problems(self) -> list[Problem]:
        """The training puzzles, to be reinforced on."""
        return replace(self, split="train").problems()

    def remarks(self) -> list[str]:
        """Nothing: the puzzles are made as they are read."""
        return []

    def _messages(self, split: str) -> list[Row]:
        rows = []
        for i, puzzle in enumerate(self._puzzles(split)):
            user = {"role": "user", "content": puzzle.question}
            assistant = {"role": "assistant", "content": puzzle.response}
            rows.append(Row(f"{split} demonstration {i}", {"messages": [user, assistant]}))
        return rows

    def _puzzles(self, split: str) -> list[Puzzle]:
        splits = draw_puzzles(self.game, self.train, self.held_out, self.test, self.seed)
        puzzles: list[Puzzle] = getattr(splits, split)
        size = {"train": self.train, "validation": self.held_out, "test": self.test}[split]
        if len(puzzles) < size:
            raise DirlError(
                f"{self.name} has no {size:,} puzzles for {split}, only {len(puzzles):,} as hard as that:"
                " lower train, held_out or test, or widen the game"
            )
        return puzzles


@lru_cache(maxsize=2)
def draw_puzzles(game: Game, train: int, held_out: int, test: int, seed: int) -> PuzzleSplits:
    """The three splits, test first, without a puzzle that occurs twice; the last are short where there are no more."""
    used: set[str] = set()
    return PuzzleSplits(
        test=draw_others(game, Random(f"{seed}/test"), test, used),
        validation=draw_others(game, Random(f"{seed}/validation"), held_out, used),
        train=draw_others(game, Random(f"{seed}/train"), train, used),
    )


def draw_others(game: Game, rng: Random, size: int, used: set[str]) -> list[Puzzle]:
    """Draw up to `size` puzzles whose keys are not in `used`, and add them to it."""
    puzzles: list[Puzzle] = []
    in_vain = 0
    while len(puzzles) < size and in_vain < TIRED:
        puzzle = game.draw(rng)
        in_vain += 1
        if puzzle.key not in used:
            used.add(puzzle.key)
            puzzles.append(puzzle)
            in_vain = 0
    return puzzles
