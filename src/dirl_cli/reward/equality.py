"""Whether two final answers say the same: read as text where that is plain, by math-verify where it is not.

math-verify can hang and eat memory on hostile text: `verified` belongs in a worker process (grading.py).
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from dirl_cli.reward.algebra import math_verified
from dirl_cli.reward.names import ARGUMENT, INDEX, differ, is_name, spelt, with_argument, with_index, without_name
from dirl_cli.reward.notation import (
    EQUALS,
    LIST,
    RATIO,
    RELATION,
    SPACE,
    bracketed,
    number,
    split,
)
from dirl_cli.reward.parts import (
    ascending,
    cases,
    conditioned,
    elements,
    holds_sets,
    kind_and_elements,
    ordered,
    solutions,
    tuples,
    without_modulus,
)
from dirl_cli.reward.tidy import tidy
from dirl_cli.reward.values import Judge, Rule, as_based, as_choice, as_endless, as_numbers, as_time, as_words
from dirl_cli.reward.words import measured

T = TypeVar("T")

PLAIN = 200  # characters; a longer answer is compared in a worker process, whatever it holds

TEXT = re.compile(r"\\text ?\{([^{}]*[\d(][^{}]*)\}")
AT_INFINITY = re.compile(r"\\infty ?\]|\[ ?[-+]? ?\\infty")
NUMERIC = re.compile(r"(?:[\d\s.,+*/^(){}!-]|\\(?:frac|sqrt|cdot|times|pi)(?![a-zA-Z]))+")
LINEAR = re.compile(r"(?=.*[-+\d/])[-+\d.*/ ()]*[A-Za-z](?! ?\()[-+\d.*/ ()]*")  # 2x, x/2 and x - 1, still to be solved
POINT = re.compile(r"^[A-Z] ?(?=\([^()]*,[^()]*\)$)")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

MODULO = r"\\[pb]?mod(?![a-z])|\\text ?\{ ?\(?mod(?:ulo)? ?\}?|mod(?:ulo)?(?![a-z])"
RESIDUE = re.compile(rf"(.*?),? ?\(? ?(?:{MODULO}) ?\{{? ?(\d+|[a-z]) ?\}}? ?\)?\}}?")
UNEQUAL = r"\\(?:[lg]e|ne|not)(?![a-z])|\\not[a-z]|[<>]"
CASES = re.compile(r"\\begin\{d?cases\}(.*)\\end\{d?cases\}", re.DOTALL)


class Unclear(Exception):  # noqa: N818
    """Text alone does not tell."""


def plainly_equal(gold: str, answer: str) -> bool | None:
    """The verdict of `verified` where that takes no math-verify, else None."""
    if gold == answer or not answer:
        return bool(gold and answer)
    if len(answer) > PLAIN:
        return None
    try:
        return compared(gold, answer, unclear)
    except Unclear:
        return None


def verified(gold: str, answer: str) -> bool:
    """Whether `answer` says what `gold` says."""
    return compared(gold, answer, math_verified)


def compared(gold: str, answer: str, judge: Judge) -> bool:
    """`same`, of texts as they were written; where ', ' separates, other commas may be those of thousands."""
    gold = tidy(gold)
    answer = tidy(answer)
    if same(gold, answer, judge):
        return True
    joined_gold = without_thousands(gold)
    joined_answer = without_thousands(answer)
    if joined_gold == gold and joined_answer == answer:
        return False
    return same(joined_gold, joined_answer, judge)


def without_thousands(text: str) -> str:
    """The text without commas inside numbers, where another comma has a space behind it."""
    if ", " not in text:
        return text
    return THOUSANDS.sub("", text)


def same(gold: str, answer: str, judge: Judge) -> bool:
    """Whether two tidy texts say the same: the first rule that can tell decides, or else the judge."""
    if SPACE.sub("", gold) == SPACE.sub("", answer):
        return bool(gold)
    gold = unwrapped(gold)
    answer = unwrapped(answer)

    # First the rules for which words count, then those for what is left without units and such.
    verdict = decided(WORDED, gold, answer, judge)
    if verdict is not None:
        return verdict
    expected = measured(gold)
    actual = measured(answer)
    if expected.differs(actual):
        return False
    verdict = decided(RULES, expected.text, actual.text, judge)
    if verdict is not None:
        return verdict
    return judge(expected.text, actual.text)


def unwrapped(text: str) -> str:
    r"""What a \text{…} holds that is all of the text and has a number or a bracket in it."""
    if not TEXT.fullmatch(text):
        return text
    return TEXT.sub(r"\1", text)


def decided(rules: Sequence[Rule], gold: str, answer: str, judge: Judge) -> bool | None:
    """What the first rule says that can tell."""
    for rule in rules:
        verdict = rule(gold, answer, judge)
        if verdict is not None:
            return verdict
    return None


def as_percent(gold: str, answer: str, judge: Judge) -> bool | None:
    """50% is 0.5, or 50 where the question asks for percent."""
    expected = gold.removesuffix(r"\%")
    actual = answer.removesuffix(r"\%")
    if expected == gold and actual == answer:
        return None
    if expected.endswith(r"\%") or actual.endswith(r"\%"):
        return False
    return same(expected, actual, judge) or same(as_share(gold), as_share(answer), judge)


def as_share(text: str) -> str:
    """A percentage as a fraction; any other text is itself."""
    if not text.endswith(r"\%"):
        return text
    percent = text.removesuffix(r"\%")
    return rf"\frac{{{percent}}}{{100}}"


def as_residues(gold: str, answer: str, judge: Judge) -> bool | None:
    """10 is 3 modulo 7; where only one tells the modulus, it is what the question tells."""
    expected = RESIDUE.fullmatch(gold)
    actual = RESIDUE.fullmatch(answer)
    if expected and actual:
        if expected[2] != actual[2]:
            return False
        expected_value = number(without_name(expected[1]))
        actual_value = number(without_name(actual[1]))
        has_modulus = expected[2].isdigit() and int(expected[2]) > 0
        if expected_value is not None and actual_value is not None and has_modulus:
            return (expected_value - actual_value) % int(expected[2]) == 0
        return same(expected[1], actual[1], judge)

    # One of them tells its modulus, the other is compared as it stands.
    if expected:
        gold = expected[1]
    if actual:
        answer = actual[1]
    stated = expected or actual
    if stated is None:
        return None
    residue = number(without_name(stated[1]))
    if residue is not None and stated[2].isdigit() and residue >= int(stated[2]):
        return None  # the remainder is still to be taken
    return same(gold, answer, judge) or None


def as_conditioned(gold: str, answer: str, judge: Judge) -> bool | None:
    """What a formula's letters stand for is the question's to say; where both tell, they must say the same."""
    expected, gold_conditions = conditioned(gold)
    actual, answer_conditions = conditioned(answer)
    if not gold_conditions and not answer_conditions:
        return None
    if gold_conditions and answer_conditions and gold_conditions != answer_conditions:
        return False
    return same(expected, actual, judge)


def as_cases(gold: str, answer: str, judge: Judge) -> bool | None:
    """Each case with its condition, in any order."""
    expected = CASES.fullmatch(gold)
    actual = CASES.fullmatch(answer)
    if not expected or not actual:
        return None
    return paired(cases(expected[1]), cases(actual[1]), lambda row, other: each_same(row, other, judge))


def paired(golds: Sequence[T], answers: Sequence[T], alike: Callable[[T, T], bool]) -> bool:
    """Whether each of the golds has its own answer, and no answer remains."""
    remaining = list(answers)
    for gold in golds:
        match = next((i for i, answer in enumerate(remaining) if alike(gold, answer)), None)
        if match is None:
            return False
        del remaining[match]
    return not remaining


def as_solutions(gold: str, answer: str, judge: Judge) -> bool | None:
    """Values with names, by their names; without names on one side, in the order of the names."""

    def alike(expected: dict[str, str], actual: dict[str, str]) -> bool:
        if expected.keys() != actual.keys():
            return False
        return all(same(expected[name], actual[name], judge) for name in expected)

    golds = solutions(gold)
    answers = solutions(answer)
    if golds and answers:
        return paired(golds, answers, alike)

    # Without names on one side, the other's values are written as that side may have them: in tuples, or in a row.
    if golds:
        if same(tuples(golds), answer, judge):
            return True
        return len(golds) == 1 and each_same(ordered(golds[0]), split(answer, LIST), judge)
    if answers and bracketed(split(gold, LIST)[0], "("):
        return same(gold, tuples(answers), judge)
    return None


def as_brackets(gold: str, answer: str, judge: Judge) -> bool | None:
    """Tuples, columns and intervals in their order; the kind of bracket counts for two elements, as in an interval."""
    if AT_INFINITY.search(answer) and not AT_INFINITY.search(gold):
        return False  # an interval that contains infinity is none
    gold = POINT.sub("", gold)
    answer = POINT.sub("", answer)
    gold_kind, golds = kind_and_elements(gold)
    answer_kind, answers = kind_and_elements(answer)
    if gold_kind and answer_kind:
        if len(golds) == 2 and gold_kind != answer_kind:
            return False
        return each_same(golds, answers, judge)

    # Round brackets may be left out on either side; square ones say something.
    if answer_kind.startswith("[") and not gold_kind and (len(answers) == 1 or NUMERIC.fullmatch(gold)):
        return False  # [5] is a list, an integral part or an interval, and no 5
    if gold_kind == "()" and len(golds) == len(answers):
        return each_same(golds, answers, judge)
    if answer_kind == "()" and len(answers) == 1:
        return same(gold, answers[0], judge)
    return None


def as_ratio(gold: str, answer: str, judge: Judge) -> bool | None:
    """Term by term if there are three and more; one of two is a quotient."""
    golds = split(without_name(gold), RATIO)
    answers = split(without_name(answer), RATIO)
    if max(len(golds), len(answers)) <= 2:
        return None
    return each_same(golds, answers, judge)


def each_same(golds: Sequence[str], answers: Sequence[str], judge: Judge) -> bool:
    """Whether two lists say the same, term by term in their order."""
    if len(golds) != len(answers):
        return False
    return all(same(gold, answer, judge) for gold, answer in zip(golds, answers, strict=True))


def as_lists(gold: str, answer: str, judge: Judge) -> bool | None:
    """The same elements in any order, each in the answer at least as often as in the gold."""
    if holds_sets(gold) != holds_sets(answer):
        return False
    golds = elements(gold)
    answers = elements(answer)
    if len(golds) > 1 and len(answers) == 1:
        # Several are asked for: 8,221 are then two numbers, and (1,2) are, too, unless the gold is a set.
        brackets = bracketed(answer, "(")
        if brackets and not bracketed(gold, r"\{"):
            answers = elements(brackets[1])
        else:
            answers = split(answer, LIST)
    if [*golds, *answers] == [gold, answer]:
        return None

    if covers(golds, answers, judge):
        return True
    # A union may be cut into other intervals.
    return r"\cup" in gold + answer and judge(gold, answer)


def covers(golds: Sequence[str], answers: Sequence[str], judge: Judge) -> bool:
    """Whether the answers are the golds: one that repeats another is no mistake, one that is no gold is."""
    remaining = list(golds)
    for element in answers:
        match = next((candidate for candidate in remaining if same(candidate, element, judge)), None)
        if match is not None:
            remaining.remove(match)
        elif not any(same(candidate, element, judge) for candidate in golds):
            return False
    return not remaining


def as_moduli(gold: str, answer: str, judge: Judge) -> bool | None:
    """|x| < 2 is -2 < x < 2, and |x| > 2 is x < -2 or x > 2, where one says it in inequalities."""
    if "|" not in gold + answer or not (re.search(RELATION, gold) and re.search(RELATION, answer)):
        return None
    expected = without_modulus(gold)
    actual = without_modulus(answer)
    if expected == gold and actual == answer:
        return None
    return same(expected, actual, judge)


def as_inequalities(gold: str, answer: str, judge: Judge) -> bool | None:
    """3 > x > 1 is 1 < x < 3; what differs in more is for algebra."""
    gold_terms, gold_signs = ascending(gold)
    answer_terms, answer_signs = ascending(answer)
    if not gold_signs or gold_signs != answer_signs:
        return None
    return each_same(gold_terms, answer_terms, judge) or None


def as_approximate(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""x \approx 5 is judged as x = 5 is, by its digits: they are right where they are the gold's."""
    name, sign, value = map(str.strip, answer.partition(r"\approx"))
    if sign and not value:
        return False
    if not sign or not is_name(name) or r"\approx" in gold:
        return None
    if name:
        value = f"{name} = {value}"
    return same(gold, value, judge)


def as_equations(gold: str, answer: str, judge: Judge) -> bool | None:
    """x = 5 is 5, and so is 10/2 = 5; what an equation names must agree, and 5 = 3 is neither."""
    *gold_names, expected = split(gold, EQUALS)
    *answer_names, actual = split(answer, EQUALS)
    if not gold_names and not answer_names:
        return None
    if not gold_names:
        # What is not solved for, as in 2x = 10, gives no value, and each number of a chain is the value already.
        if not all(same(gold, side, judge) for side in answer_names if NUMERIC.fullmatch(side)):
            return False
        is_linear = LINEAR.fullmatch(without_fractions(answer_names[0])) is not None
        if is_linear or any(re.search(UNEQUAL, side) for side in answer_names):
            return False
        return same(gold, actual, judge)
    if not answer_names:
        return is_name(gold_names[0]) and same(expected, answer, judge)

    # Both have names. With another index or argument the answer's formula may still be the gold's, renamed.
    name = gold_names[0]
    other = answer_names[0]
    if not is_name(name) or spelt(name) != spelt(other) or differ(INDEX, name, other):
        renamed = with_index(actual, name, other)
        if renamed is None:
            return judge(gold, answer)
        return same(expected, renamed, judge)
    if differ(ARGUMENT, name, other):
        renamed = with_argument(actual, ARGUMENT.findall(other), ARGUMENT.findall(name))
        return renamed is not None and same(expected, renamed, judge)
    return same(expected, actual, judge)


def without_fractions(text: str) -> str:
    return re.sub(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"(\1)/(\2)", text)


def as_rounded(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""Where the gold is given with \approx, its decimals are those that count; an answer's must be rightly rounded."""
    exact, sign, rounded = map(str.strip, gold.partition(r"\approx"))
    if not sign:
        exact, sign, rounded = map(str.strip, answer.partition(r"\approx"))
        if not sign or is_name(exact):
            return None
        return rounds(rounded, exact) is not False and same(gold, exact, judge)

    if rounds(rounded, answer):
        return True
    expected = rounded if is_name(exact) else exact  # x \approx 3 has but the one value
    return same(expected, answer, judge)


def rounds(rounded: str, exact: str) -> bool | None:
    """Whether a decimal is what a number rounds to; None where they are no numbers."""
    decimal = number(rounded)
    value = number(exact)
    if decimal is None or value is None:
        return None
    places = len(rounded.partition(".")[2])
    return round(value, places) == decimal


# Each rule reads both texts one way; where it has nothing to say it returns None, and the next is asked.
WORDED: tuple[Rule, ...] = (as_choice, as_time)  # for these the words count that stand beside
RULES: tuple[Rule, ...] = (
    as_percent,
    as_numbers,
    as_words,
    as_residues,
    as_based,
    as_endless,
    as_conditioned,
    as_cases,
    as_solutions,
    as_brackets,
    as_ratio,
    as_moduli,
    as_lists,
    as_inequalities,
    as_approximate,
    as_equations,
    as_rounded,
)


def unclear(gold: str, answer: str) -> bool:
    raise Unclear
