"""The value of an expression such as (3+5)*7/2, exactly; no text that is none is ever run."""

import re
from collections.abc import Callable
from fractions import Fraction
from operator import add, mul, sub, truediv

LONGEST = 200  # characters; far more than the numbers of a game need, and few enough to parse in no time
SIGNS = {
    "×": "*",
    "·": "*",
    "÷": "/",
    "−": "-",
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
    r"\left": "",
    r"\right": "",
}
WRITTEN = re.compile("|".join(map(re.escape, SIGNS)))
TOKEN = re.compile(r"[0-9]+|[-+*/()]")
OTHER = re.compile(r"[^-+*/()0-9\s]")

Operation = Callable[[Fraction, Fraction], Fraction]
OPERATIONS: dict[str, Operation] = {"+": add, "-": sub, "*": mul, "/": truediv}
PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}


class NotAnExpressionError(Exception):
    """The text is no sum, difference, product or quotient of whole numbers."""


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression and the numbers that stand in it, in order; None for any other text.

    An expression is made of whole numbers, + - * / and their signs in print, and round brackets. None too for one that
    divides by zero or is longer than 200 characters.
    """
    if len(text) > LONGEST:
        return None
    try:
        tokens = tokens_of(WRITTEN.sub(lambda match: SIGNS[match.group()], text))
        return value_of(tokens), [int(token) for token in tokens if token.isdigit()]
    except (NotAnExpressionError, ZeroDivisionError):
        return None


def tokens_of(text: str) -> list[str]:
    """Numbers, signs and brackets. Raises NotAnExpressionError for anything else."""
    if OTHER.search(text):
        raise NotAnExpressionError
    return TOKEN.findall(text)


def value_of(tokens: list[str]) -> Fraction:
    """The value, by Dijkstra's shunting yard: with stacks of its own, so that no nesting is too deep.

    Raises NotAnExpressionError where the tokens do not make an expression.
    """
    values: list[Fraction] = []
    waiting: list[str] = []  # operators and open brackets whose right side is not complete
    expects_value = True
    for token in tokens:
        if expects_value and token == "-":
            waiting.append("negative")
        elif expects_value and token == "(":
            waiting.append(token)
        elif expects_value and token.isdigit():
            values.append(Fraction(int(token)))
            expects_value = False
        elif not expects_value and token == ")":
            apply_waiting(1, waiting, values)
            if not waiting:
                raise NotAnExpressionError
            waiting.pop()
        elif not expects_value and token in OPERATIONS:
            apply_waiting(PRECEDENCE[token], waiting, values)
            waiting.append(token)
            expects_value = True
        else:
            raise NotAnExpressionError

    if expects_value or "(" in waiting:
        raise NotAnExpressionError
    apply_waiting(1, waiting, values)
    return values.pop()


def apply_waiting(least: int, waiting: list[str], values: list[Fraction]) -> None:
    """Apply the waiting operators from the last on, as long as their precedence is at least so much."""
    while waiting and PRECEDENCE[waiting[-1]] >= least:
        operator = waiting.pop()
        right = values.pop()
        if operator == "negative":
            values.append(-right)
        else:
            values.append(OPERATIONS[operator](values.pop(), right))
