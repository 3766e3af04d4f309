"""Expressions have their exact value, and nothing else is run."""

import time
from fractions import Fraction
from random import Random

import pytest

from dirl_cli.reward.expressions import evaluate


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, [7]),
        ("3+5*7", 38, [3, 5, 7]),
        ("(3+5)*7", 56, [3, 5, 7]),
        ("10-3-2", 5, [10, 3, 2]),
        ("24/4/3", 2, [24, 4, 3]),
        ("8/(3-8/3)", 24, [8, 3, 8, 3]),
        ("1/3", Fraction(1, 3), [1, 3]),
        ("-3+5", 2, [3, 5]),
        ("2*-3", -6, [2, 3]),
        ("--3", 3, [3]),
        (" ( 3 + 5 ) × 7 ÷ 2 − 1 ", 27, [3, 5, 7, 2, 1]),
        (r"\left(3+5\right) \times 7", 56, [3, 5, 7]),
    ],
)
def test_an_expression_has_a_value_and_its_numbers(text: str, value: int | Fraction, numbers: list[int]) -> None:
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "+", "3+", "+3", "()", "(3", "3)", ")3(", "3 5", "3(5)", "(3)(5)", "3+*5", "2.5", "1e3", "1_000"),
        *("9**9**9**9", "9^9", "3//2", "3%2", "5!", "x", "3 if 1 else 2", "3=3", "[3]", "3,5", "٣+٥"),
        *("1/0", "5/(3-3)", "0/0", "__import__('os').system('true')", "(lambda: 3)()", "print(3)", "\x00", "\ud800"),
    ],
)
def test_anything_else_has_none(text: str) -> None:
    assert evaluate(text) is None


@pytest.mark.parametrize(
    "text",
    ["(" * 100 + "1" + ")" * 100, "(" * 200, "-" * 199 + "1", "9" * 200, "9*" * 99 + "9", "1/" * 99 + "9"],
)
def test_two_hundred_characters_of_anything_take_no_time(text: str) -> None:
    began = time.process_time()
    evaluate(text)
    evaluate(text * 100_000)
    assert time.process_time() - began < 2
    assert evaluate(text + " " * 200) is None  # too long


def test_brackets_may_be_nested_as_deep_as_they_fit() -> None:
    assert evaluate("(" * 99 + "5" + ")" * 99) == (5, [5])


def drawn_expression(rng: Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        return str(rng.randrange(10))
    left, right = drawn_expression(rng, depth - 1), drawn_expression(rng, depth - 1)
    text = left + rng.choice(["+", "-", "*", "/", " - -"]) + right
    return f"({text})" if rng.random() < 0.5 else text


def test_python_agrees() -> None:
    rng = Random(0)
    values = 0
    for _ in range(2000):
        text = drawn_expression(rng, 4)
        if len(text) > 200:
            continue
        try:
            expected = eval("".join(f"Fraction({c})" if c.isdigit() else c for c in text), {"Fraction": Fraction})
        except ZeroDivisionError:
            assert evaluate(text) is None
        else:
            value, _ = evaluate(text)
            assert value == expected
            values += 1
    assert values > 1000
