"""Tasks of reasoning-gym, each a generator and a scorer, as disjoint splits drawn from a seed."""

import json
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Any

from dirl_cli.data.embedded import Puzzle, Puzzles
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Natural, OneOf, Seed
from dirl_cli.reward.gym import entry_of, task_named
from dirl_cli.types import Problem


@dataclass(frozen=True)
class Gym:
    """A task of reasoning-gym (arXiv 2505.24760) with its own scorer; no question is in two of the three splits.

    task: its name there. options: how it is set up, such as {min_numbers: 3}; what is not given is as there.
    train, held_out, test: questions per split; those of test depend on the task, `options`, `seed` and `test` alone.
    split: what `problems` gives: train, validation or test.
    """

    name: str
    task: str
    options: dict[str, Any] = field(default_factory=dict)
    train: Natural = 2_000
    held_out: Natural = 100
    test: Natural = 200
    seed: Seed = 0
    split: Annotated[str, OneOf("train", "validation", "test")] = "test"

    def __post_init__(self) -> None:
        task_named(self.task, self.options)

    def demonstrations(self) -> list[Row]:
        """The training questions with the task's own answers. Raises DirlError for a task that gives none."""
        for problem in self.training_problems():
            if not problem.answer:
                raise DirlError(f"{self.task} has questions without an answer to learn from: use it with `dirl rl`")
        return self.splits.demonstrations()

    def validation(self) -> list[Row]:
        """The `held_out` demonstrations, none of which is trained on."""
        return self.splits.validation()

    def problems(self) -> list[Problem]:
        """The questions of `split`."""
        return self.splits.problems()

    def training_problems(self) -> list[Problem]:
        """The training questions, to be reinforced on."""
        return self.splits.training_problems()

    def remarks(self) -> list[str]:
        """Nothing: the questions are made as they are read."""
        return []

    @property
    def splits(self) -> Puzzles:
        game = GymGame(self.task, json.dumps(self.options, sort_keys=True))
        return Puzzles(self.name, game, self.train, self.held_out, self.test, self.seed, self.split)


@dataclass(frozen=True)
class GymGame:
    """A task as a game. options: as JSON."""

    task: str
    options: str
    verifier = "gym"

    def draw(self, rng: Random) -> Puzzle:
        """A question of a seed of its own, from which its scorer makes it anew."""
        details = {"task": self.task, "options": json.loads(self.options), "seed": rng.randrange(2**31)}
        entry = entry_of(details)
        answer = entry["answer"] or ""  # some tasks have only a scorer
        return Puzzle(entry["question"], entry["question"], answer, answer, self.task, details)
