"""Mixed word problems: the embedded data set, made of two or three additions and subtractions of the numbers 1 to 9."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Annotated, NamedTuple, TypeVar

from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Natural, OneOf, Seed, Share
from dirl_cli.types import Problem

NAMES = ("Tom", "Anna", "Ben", "Emma", "Sam", "Lena", "Nora", "Otto")
OBJECTS = ("pens", "books", "cards", "coins", "eggs", "apples", "shells", "stamps")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("sells", "loses", "drops", "eats")

MOST = 1_000_000  # problems, drawn in twenty seconds; a hundred times as many exist, ever harder to find

T = TypeVar("T")
Chain = tuple[int, ...]  # the first number, then each change with its sign


class Item(NamedTuple):
    """A word problem and the chain of numbers behind it."""

    question: str
    chain: Chain

    @property
    def answer(self) -> str:
        return str(sum(self.chain))

    def solution(self, worked: bool) -> str:
        """The demonstrated answer: one equation per line and the box, or the box alone."""
        box = f"\\boxed{{{self.answer}}}"
        return f"{equations(self.chain)}{box}" if worked else box


class Splits(NamedTuple):
    test: list[Item]
    validation: list[Item]
    train: list[Item]


@dataclass(frozen=True)
class Arithmetic:
    """Word problems with solutions, drawn from `seed`; no question occurs in two of the three splits.

    train, held_out, test: problems per split. The test problems depend on `seed` and `test` alone.
    worked: share of the demonstrations that show the working; the others give the answer at once.
    split: what `problems` gives: train, validation or test.
    """

    name: str = "arithmetic"
    train: Natural = 40_000
    held_out: Natural = 300
    test: Natural = 1_000
    worked: Share = 0.7
    seed: Seed = 0
    split: Annotated[str, OneOf("train", "validation", "test")] = "test"

    def demonstrations(self) -> list[Row]:
        """The training problems with their solutions, as messages."""
        return self._messages("train", self._splits().train)

    def validation(self) -> list[Row]:
        """The `held_out` demonstrations, none of which is trained on."""
        return self._messages("validation", self._splits().validation)

    def problems(self) -> list[Problem]:
        """The problems of `split`; the subset says whether training holds the same numbers and operations."""
        splits = self._splits()
        seen = {item.chain for item in splits.train}
        problems = []
        for i, item in enumerate(getattr(splits, self.split)):
            subset = "seen" if item.chain in seen else "unseen"
            solution = item.solution(worked=True)
            problems.append(Problem(f"{self.split}-{i}", item.question, item.answer, subset, solution=solution))
        return problems

    def training_problems(self) -> list[Problem]:
        """The training problems as questions with answers, to be reinforced on."""
        return replace(self, split="train").problems()

    def remarks(self) -> list[str]:
        """Nothing: the problems are made as they are read."""
        return []

    def texts(self) -> Iterator[str]:
        """The training questions, each followed by its solution: what a tokenizer may learn from."""
        for row in self.demonstrations():
            yield from (message["content"] for message in row.fields["messages"])

    def _splits(self) -> Splits:
        if (size := self.train + self.held_out + self.test) > MOST:
            raise DirlError(f"{self.name} has no {size:,} problems: give its splits {MOST:,} in all")
        return draw_splits(self.train, self.held_out, self.test, self.seed)

    def _messages(self, split: str, items: list[Item]) -> list[Row]:
        rng = Random(f"{self.seed}/{split}/worked")  # its own, so that the questions do not depend on `worked`
        rows = []
        for i, item in enumerate(items):
            user = {"role": "user", "content": item.question}
            assistant = {"role": "assistant", "content": item.solution(rng.random() < self.worked)}
            rows.append(Row(f"{split} demonstration {i}", {"messages": [user, assistant]}))
        return rows


@lru_cache(maxsize=2)
def draw_splits(train: int, held_out: int, test: int, seed: int) -> Splits:
    """The three splits, test first, without a question that occurs twice."""
    used: set[str] = set()
    return Splits(
        test=draw_items(Random(f"{seed}/test"), test, used),
        validation=draw_items(Random(f"{seed}/validation"), held_out, used),
        train=draw_items(Random(f"{seed}/train"), train, used),
    )


def draw_items(rng: Random, size: int, used: set[str]) -> list[Item]:
    """Draw `size` problems whose questions are not in `used`, and add them to it."""
    items: list[Item] = []
    while len(items) < size:
        chain = draw_chain(rng)
        question = write_question(rng, chain)
        if question not in used:
            used.add(question)
            items.append(Item(question, chain))
    return items


def draw_chain(rng: Random) -> Chain:
    """A number and two or three changes of 1 to 9, never falling below 1."""
    # Something is left to lose only above 1, and never more than is there.
    total = pick(rng, range(1, 10))
    chain = [total]
    for _ in range(pick(rng, (2, 3))):
        if total == 1 or rng.random() < 0.5:
            change = pick(rng, range(1, 10))
        else:
            change = -pick(rng, range(1, min(total, 10)))
        total += change
        chain.append(change)
    return tuple(chain)


def write_question(rng: Random, chain: Chain) -> str:
    """The chain as a story, such as: Tom has 7 pens. Tom buys 5. Tom sells 3. How many pens?"""
    name = pick(rng, NAMES)
    objects = pick(rng, OBJECTS)
    first, *changes = chain
    events = ""
    for change in changes:
        verb = pick(rng, GAINS if change > 0 else LOSSES)
        events += f" {name} {verb} {abs(change)}."
    return f"{name} has {first} {objects}.{events} How many {objects}?"


def equations(chain: Chain) -> str:
    """Each change as an equation on its own line, such as 7+5=12."""
    total, *changes = chain
    lines = ""
    for change in changes:
        lines += f"{total}{change:+d}={total + change}\n"
        total += change
    return lines


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of the options; drawn by `random()`, the only method that Python promises never to change."""
    return options[int(rng.random() * len(options))]
