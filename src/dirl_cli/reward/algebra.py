"""Whether math-verify holds two tidy answers for equal, with a guard for each fault of it that we know.

It can hang and eat memory on hostile text: this belongs in a worker process (grading.py).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache, lru_cache
from random import Random
from typing import Any

from dirl_cli.reward.notation import has_decimals, round_alike

Judge = Callable[..., bool]

DIGITS = 100  # to which numbers are computed
SMALL = Fraction(1, 10**80)  # the difference of equal ones, as a part of them
POINTS = 6  # at which formulas are compared
WORD = re.compile(r"-?(?:(?:Integer|Float|Rational|Symbol|Function) *)?\(? *'?[\w.+-]*'? *\)? *")  # as sympy writes it

NAME = r"([a-zA-Z])('*)(?:_\{ ?([\w+-]+) ?\}|_(\w))?"  # a letter, its primes and its index
TOKEN = re.compile(rf"{NAME}|\\(?:text|mbox|begin|end) ?\{{[^{{}}]*\}}|\\[a-zA-Z]+|_\{{[^{{}}]*\}}|_.|!!|.", re.DOTALL)
INDEX = re.compile(r"_\{? ?(?:[a-zA-Z]*i|i *=)")
DUMMY = re.compile(r"\\(?:sum|prod) ?_ ?\{ ?([a-z]) ?=")
TO_THE_T = re.compile(r"(?<!\\end\{.matrix\})\^ ?\{? ?T(?![a-z])")
PRIME = re.compile(r"\^ ?\{? ?\\prime(?![a-zA-Z]) ?\}?")


@lru_cache(maxsize=4096)
def math_verified(gold: str, answer: str) -> bool:
    """Whether math-verify holds `answer` for `gold`."""
    guard()
    from math_verify import verify

    both = gold + answer
    # Both texts get the same names, so a letter is told from its capital in both where either has the two.
    letters = {match[1] for match in TOKEN.finditer(both)}
    cased = {letter for letter in letters if letter and letter.isupper() and letter.lower() in letters}
    if TO_THE_T.search(both):
        cased.add("T")
    expected = parsed(spelt_out(gold, frozenset(cased)))
    actual = parsed(spelt_out(answer, frozenset(cased)))
    return verify(expected, actual, allow_set_relation_comp=True, timeout_seconds=None)


def spelt_out(text: str, cased: frozenset[str]) -> str:
    """The text with names for what math-verify does not see.

    It drops primes, so that f' is f; it reads every capital as its small letter, so that R - r is 0, which we let it
    do only with letters that come in one size; it takes i for a variable and I, with any index, for the imaginary
    unit, whose power it drops unless there is a bracket; it drops a T as exponent, as if of a matrix, and the index of
    a number; it takes the terms a_k of a sum for one number, and n!! for (n!)!.
    """
    text = PRIME.sub("'", text)
    imaginary = not INDEX.search(text)
    dummies = frozenset(DUMMY.findall(text))
    spelt = ""
    for match in TOKEN.finditer(text):
        token = match[0]
        if token == "i" and imaginary:
            is_power = text[match.end() :].lstrip().startswith("^")
            spelt += "(I)" if is_power else "I"
        elif match[1]:
            name = distinct_name(match, cased, dummies)
            if spelt.endswith("^"):  # an exponent without braces ends at its first letter
                name = f"{{{name}}}"
            spelt += name
        elif token == "'":  # of a number
            spelt += r" \cdot p_{prime}"
        elif token == "!!":
            spelt += "^{w_{twice}}"
        elif token.startswith("_") and re.search(r"[\d)}]$", spelt):  # an index of a number
            spelt += rf" \cdot q_{{index{in_letters(token)}}}"
            if token == "_{":  # it holds braces of its own, and is closed later
                spelt += "{"
        else:
            spelt += token
    return spelt


def distinct_name(match: re.Match[str], cased: frozenset[str], dummies: frozenset[str]) -> str:
    """A letter with its primes and index, under a name that math-verify keeps apart from others."""
    # What tells the letter apart from others is written as letters of an index, the one place where all are kept.
    letter = match[1]
    index = match[3] or match[4] or ""
    marks = "prime" * len(match[2])
    running = [dummy for dummy in index if dummy in dummies]
    if len(running) == 1:  # a term of a sequence is a function of its index
        return f"{letter}_{{{marks}{in_letters(index.replace(running[0], 'index'))}}}({running[0]})"
    marks += in_letters(index)
    if letter == "I":
        return f"H_{{capital{marks}}}"
    if letter == "i" and index:
        return f"H_{{small{marks}}}"
    if letter in cased and letter.isupper():
        return f"{letter}_{{capital{marks}}}"
    if match[2]:
        return f"{letter}_{{{marks}}}"
    return match[0]


def in_letters(index: str) -> str:
    """An index in letters and digits alone, since signs would be read."""
    return re.sub(r"\W|_", "", index.replace("+", "plus").replace("-", "minus"))


@lru_cache(maxsize=4096)
def parsed(text: str) -> list[Any]:
    """What math-verify reads: as LaTeX in a box only, since it takes the last number of loose text for its answer."""
    from math_verify import LatexExtractionConfig, parse

    latex = LatexExtractionConfig(boxed_match_priority=0)
    latex = replace(latex, normalization_config=replace(latex.normalization_config, units=False))  # 2d is not 2
    return parse(rf"\boxed{{{text}}}", [latex], parsing_timeout=None)


@cache
def guard() -> None:
    """Put our own comparison of values in the place of math-verify's, and let sympy evaluate no text."""
    from math_verify import grader, parser
    from sympy.parsing import sympy_parser

    sympy_parser.eval_expr = only_words(sympy_parser.eval_expr)
    grader.sympy_numeric_eq = numbers_equal(grader.sympy_numeric_eq)
    grader.sympy_symbolic_eq = formulas_equal(grader.sympy_symbolic_eq)
    grader.sympy_solve_and_compare = solutions_equal(grader.sympy_solve_and_compare)
    # With an i in one of two texts, math-verify takes the same letters for other symbols there than in the other text.
    parser.should_treat_as_complex = lambda text: False


def only_words(evaluate: Any) -> Any:
    """Sympy gives numbers that it is handed as text to `eval`: from now on these and single names only."""

    def evaluate_word(code: str, *names: Any) -> Any:
        if not WORD.fullmatch(code):
            raise ValueError(f"{code[:40]} is not evaluated")
        return evaluate(code, *names)

    return evaluate_word


def numbers_equal(original: Judge) -> Judge:
    """Equality of numbers.

    math-verify takes (a - b).evalf(chop=True) == 0, which makes whatever is below 1e-15 equal, even as a factor of
    something huge, so that terms get lost; and it rounds to six places however small the number is.
    """
    from sympy import Float

    def equal(a: Any, b: Any, *precision: int) -> bool:
        if is_matrix(a) or is_matrix(b):
            return original(a, b, *precision)  # calls this one for each element
        if a.free_symbols or b.free_symbols:
            return False  # the other comparison is for these

        # Whether it was written with decimals is seen no longer when they are exact fractions.
        a_has_decimals = a.has(Float)
        b_has_decimals = b.has(Float)
        a = exact(a).doit()
        b = exact(b).doit()

        # A decimal may be rounded where the other number is one that no decimal equals.
        if (a_has_decimals and a.is_Rational) != (b_has_decimals and b.is_Rational):
            p = as_fraction(a)
            q = as_fraction(b)
            if p is not None and q is not None:
                a_ends = a.is_Rational and has_decimals(p)
                b_ends = b.is_Rational and has_decimals(q)
                if a_ends and not b_ends:
                    return round_alike(q, p)
                if not a_ends:
                    return round_alike(p, q)

        verdict = same_value(a, b)
        if verdict is None:
            return bool(a == b)
        return verdict

    return equal


def formulas_equal(original: Judge) -> Judge:
    """Equality of formulas: by their values at some points, which is quick and sure, and by algebra elsewhere."""
    from sympy import Derivative, Integral, Limit, Product, Sum
    from sympy.core.function import AppliedUndef

    def equal(a: Any, b: Any) -> bool:
        if is_matrix(a) or is_matrix(b):
            return original(a, b)
        a = exact(a)
        b = exact(b)
        without_values = (AppliedUndef, Derivative, Integral, Limit, Product, Sum)
        if a.has(*without_values) or b.has(*without_values):
            return bool(a.as_dummy() == b.as_dummy()) or original(a, b)

        # A formula may have no value at some of the points, as 1/x at 0; where most are such, algebra decides.
        verdicts = [equal_at(point, a, b) for point in range(POINTS)]
        decided = [verdict for verdict in verdicts if verdict is not None]
        if len(decided) <= POINTS // 2:
            return original(a, b)
        return all(decided)

    return equal


def solutions_equal(original: Judge) -> Judge:
    """Equality of equations: math-verify compares their solutions pair by pair, so that two without any are equal."""
    from sympy import Eq, solve

    def equal(gold: Any, answer: Any, *precision: int) -> bool:
        if isinstance(gold, Eq) and not solve(gold, gold.free_symbols):
            return False
        return original(gold, answer, *precision)

    return equal


def equal_at(point: int, a: Any, b: Any) -> bool | None:
    """Whether two formulas have the same value where their variables have certain values; None if one has none."""
    from sympy import Rational

    values = {}
    for symbol in a.free_symbols | b.free_symbols:
        chance = Random(f"{symbol.name} {point}")  # the same for the same name
        values[symbol] = Rational(chance.choice((-1, 1)) * chance.randrange(1, 1000), 101)
    return same_value(a.xreplace(values).doit(), b.xreplace(values).doit())


def same_value(a: Any, b: Any) -> bool | None:
    """Whether two numbers are equal, exactly if they are rational; None where one is not finite."""
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    x = value(a)
    y = value(b)
    if x is None or y is None:
        return None
    return bool(abs(x - y) <= max(abs(x), abs(y)) * SMALL)


def exact(expression: Any) -> Any:
    """The expression with the decimals that were written, not their binary neighbours."""
    from sympy import Float, Rational

    rationals = {decimal: Rational(str(decimal)) for decimal in expression.atoms(Float)}
    return expression.xreplace(rationals)


def value(expression: Any) -> Any:
    """A number to DIGITS digits, None where it is not finite; what gets smaller with more digits is 0."""
    from sympy import Integer

    evaluated = expression.evalf(DIGITS, maxn=4 * DIGITS)
    if not evaluated.is_number or not evaluated.is_finite:
        return None
    if abs(evaluated) < SMALL:
        more = expression.evalf(3 * DIGITS, maxn=9 * DIGITS)
        if abs(more) <= abs(evaluated) * SMALL:
            return Integer(0)
        return more
    return evaluated


def as_fraction(expression: Any) -> Fraction | None:
    """The number, or what it is to DIGITS digits; None if it is not real."""
    from sympy import Rational

    real = expression if expression.is_Rational else value(expression)
    if real is None or not real.is_real:
        return None
    ratio = Rational(real)
    return Fraction(int(ratio.p), int(ratio.q))


def is_matrix(expression: Any) -> bool:
    from sympy import MatrixBase, MatrixExpr

    return isinstance(expression, MatrixBase | MatrixExpr)
