"""Countdown: reach a target from some numbers by + - * /; its solver says which are reached, and how."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Annotated, NamedTuple

from dirl_cli.data.arithmetic import pick
from dirl_cli.data.embedded import Puzzle
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Count, OneOf, Range

IN_VAIN = 1_000  # draws of numbers that reach no target of the range, after which there are taken to be none


@dataclass(frozen=True)
class Countdown:
    """Some numbers and a target that uses each exactly once (TinyZero's and d1's rule). The question is 3 5 7 = 22.

    numbers: how many; the solver takes ten times longer with each, 3 ms for five. largest_number: each is drawn from 1
    to this. operators: those that the solver joins numbers by; the verifier takes all four.
    smallest_target, largest_target: of those that the numbers reach, each is drawn as often.
    steps: whether demonstrations compute each part before they give the expression.
    """

    numbers: Annotated[int, Range(at_least=2, at_most=6)] = 3
    largest_number: Count = 9
    operators: Annotated[str, OneOf("+-", "+-*", "+-*/")] = "+-*/"
    smallest_target: Count = 1
    largest_target: Count = 50
    steps: bool = True
    verifier = "countdown"

    def draw(self, rng: Random) -> Puzzle:
        """Numbers in any order and a target that they reach, with the solver's expression."""
        for _ in range(IN_VAIN):
            numbers = [pick(rng, range(1, self.largest_number + 1)) for _ in range(self.numbers)]
            reached = targets_of(tuple(sorted(numbers)), self.operators)
            targets = [target for target in sorted(reached) if self.smallest_target <= target <= self.largest_target]
            if targets:
                break
        else:
            raise DirlError(
                f"{self.numbers} numbers from 1 to {self.largest_number} reach no target from {self.smallest_target}"
                f" to {self.largest_target} by {self.operators}: widen the targets"
            )

        target = pick(rng, targets)
        solution = reached[target]
        question = f"{' '.join(map(str, numbers))} = {target}"
        expression = written(solution)
        response = f"{computation(solution)}{expression}" if self.steps else expression
        key = f"{sorted(numbers)} {target}"
        details = {"numbers": numbers, "target": target}
        return Puzzle(key, question, expression, response, f"{self.numbers} numbers", details)


class Computed(NamedTuple):
    """A number that was given, or two joined by an operator."""

    value: int
    operator: str = ""
    left: Computed | None = None
    right: Computed | None = None


@lru_cache(maxsize=100_000)
def targets_of(numbers: tuple[int, ...], operators: str = "+-*/") -> dict[int, Computed]:
    """Every whole number above 0 that uses each of the numbers once, with one way to it; all steps are such, too.

    Of several ways the one whose last operator comes first in `operators` is taken.
    """
    reached: dict[int, dict[int, Computed]] = {}  # by the set of numbers used, as bits of their places
    for subset in range(1, 1 << len(numbers)):
        if subset & (subset - 1) == 0:
            number = numbers[subset.bit_length() - 1]
            reached[subset] = {number: Computed(number)}
        else:
            reached[subset] = joined(subset, reached, operators)
    return reached[(1 << len(numbers)) - 1]


def joined(subset: int, reached: dict[int, dict[int, Computed]], operators: str) -> dict[int, Computed]:
    """What a set of numbers reaches from what each two parts of it do."""
    ways: dict[int, Computed] = {}
    for operator in operators:
        half = (subset - 1) & subset
        while half:
            for left in reached[half].values():
                for right in reached[subset ^ half].values():
                    value = applied(operator, left.value, right.value)
                    if value is not None and value not in ways:
                        ways[value] = Computed(value, operator, left, right)
            half = (half - 1) & subset
    return ways


def applied(operator: str, left: int, right: int) -> int | None:
    """The result, where it is a whole number above 0."""
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right if left > right else None
        case "*":
            return left * right
        case _:
            return left // right if left % right == 0 else None


def written(number: Computed) -> str:
    """As an expression, with the brackets that it needs."""
    if number.left is None or number.right is None:
        return str(number.value)
    left, right = written(number.left), written(number.right)
    is_product = number.operator in "*/"
    if is_product and number.left.operator in ("+", "-"):
        left = f"({left})"
    if number.right.operator in ("+", "-") and number.operator != "+":
        right = f"({right})"
    if number.right.operator in ("*", "/") and number.operator == "/":
        right = f"({right})"
    return left + number.operator + right


def computation(number: Computed) -> str:
    """Each part as an equation on its own line, such as 3*5=15."""
    if number.left is None or number.right is None:
        return ""
    own = f"{number.left.value}{number.operator}{number.right.value}={number.value}\n"
    return computation(number.left) + computation(number.right) + own
