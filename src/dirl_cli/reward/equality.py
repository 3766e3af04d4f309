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
    has_decimals,
    number,
    round_alike,
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
from dirl_cli.reward.words import measured

T = TypeVar("T")
Judge = Callable[[str, str], bool]
Rule = Callable[[str, str, Judge], bool | None]

PLAIN = 200  # characters; a longer answer is compared in a worker process, whatever it holds

TEXT = re.compile(r"\\text ?\{([^{}]*[\d(][^{}]*)\}")
WORDS = re.compile(r"(\\text ?\{ ?)?(?:(?:an?|the) )?([A-Za-z][A-Za-z' -]*)\}?")
BASED = re.compile(r"\(?((?=[A-F]*\d)[\dA-F]+)\)? ?_ ?\{? ?(?:\\text ?\{)?(\d+)\}*$")
ENDLESS = re.compile(r"(.*[\d}]) ?(?:\.\.\.|\\ldots)")
AT_INFINITY = re.compile(r"\\infty ?\]|\[ ?[-+]? ?\\infty")
NUMERIC = re.compile(r"(?:[\d\s.,+*/^(){}!-]|\\(?:frac|sqrt|cdot|times|pi)(?![a-zA-Z]))+")
LINEAR = re.compile(r"(?=.*[-+\d/])[-+\d.*/ ()]*[A-Za-z](?! ?\()[-+\d.*/ ()]*")  # 2x, x/2 and x - 1, still to be solved
POINT = re.compile(r"^[A-Z] ?(?=\([^()]*,[^()]*\)$)")
SPACED = re.compile(r"[-+]?\d+(?: \d+)+")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

CALLED = "(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)? ?:? ?)?"
CHOICE = re.compile(rf"{CALLED}(?-i:\(([A-J])\)|([A-J])(?=[).:]|$)) ?[).:]? ?(.*)", re.IGNORECASE)
UPRIGHT = re.compile(r"\\text ?\{([^{}]*)\}")
SMALL_CHOICE = re.compile(rf"{CALLED}(?-i:\(([a-hj])\)|([a-hj])(?=[).:])|([a-df-hj])(?=$)) ?[).:]?", re.IGNORECASE)
OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])(?:[A-J](?![A-Za-z])|not\b|or\b|nor\b)")
TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))? ?(?:\\text ?\{ ?)?(?:([ap])\.? ?m\.?)?(?: ?\})?", re.IGNORECASE)
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
    try:
        return compared(gold, answer, unclear) if len(answer) <= PLAIN else None
    except Unclear:
        return None


def verified(gold: str, answer: str) -> bool:
    """Whether `answer` says what `gold` says."""
    return compared(gold, answer, math_verified)


def compared(gold: str, answer: str, judge: Judge) -> bool:
    """`same`, of texts as they were written; where ', ' separates, other commas may be those of thousands."""
    gold, answer = tidy(gold), tidy(answer)
    if same(gold, answer, judge):
        return True
    joined_gold = without_thousands(gold)
    joined_answer = without_thousands(answer)
    return (joined_gold, joined_answer) != (gold, answer) and same(joined_gold, joined_answer, judge)


def without_thousands(text: str) -> str:
    """The text without commas inside numbers, where another comma has a space behind it."""
    return THOUSANDS.sub("", text) if ", " in text else text


def same(gold: str, answer: str, judge: Judge) -> bool:
    """Whether two tidy texts say the same: the first rule that can tell decides, or else the judge."""
    if SPACE.sub("", gold) == SPACE.sub("", answer):
        return bool(gold)
    gold, answer = unwrapped(gold), unwrapped(answer)

    # First the rules for which words count, then those for what is left without units and such.
    verdict = decided(WORDED, gold, answer, judge)
    if verdict is not None:
        return verdict
    expected, actual = measured(gold), measured(answer)
    if expected.differs(actual):
        return False
    verdict = decided(RULES, expected.text, actual.text, judge)
    return judge(expected.text, actual.text) if verdict is None else verdict


def unwrapped(text: str) -> str:
    r"""What a \text{…} holds that is all of the text and has a number or a bracket in it."""
    return TEXT.sub(r"\1", text) if TEXT.fullmatch(text) else text


def decided(rules: Sequence[Rule], gold: str, answer: str, judge: Judge) -> bool | None:
    """What the first rule says that can tell."""
    for rule in rules:
        verdict = rule(gold, answer, judge)
        if verdict is not None:
            return verdict
    return None


def as_choice(gold: str, answer: str, judge: Judge) -> bool | None:
    """(A) is (A) 5 and Option A, but not A or B; and a, alone, unless it is e or i, which are numbers."""
    expected_text = UPRIGHT.sub(r"\1", gold).strip()
    actual_text = UPRIGHT.sub(r"\1", answer).strip()
    expected = CHOICE.fullmatch(expected_text)
    actual = CHOICE.fullmatch(actual_text)
    if expected is None or OTHER_CHOICE.search(expected[3]):
        return None
    if actual is None:
        small = SMALL_CHOICE.fullmatch(actual_text)
        return True if small and not expected[3] and letter(small).upper() == letter(expected) else None
    return None if OTHER_CHOICE.search(actual[3]) else letter(expected) == letter(actual)


def letter(choice: re.Match[str]) -> str:
    return next(filter(None, choice.groups()))


def as_time(gold: str, answer: str, judge: Judge) -> bool | None:
    """4:30 p.m. is 16:30, and 4:30 where only one tells the half of the day."""
    expected, actual = TIME.fullmatch(gold), TIME.fullmatch(answer)
    if not (expected and expected[3]) and not (actual and actual[3]):
        return None
    if expected is None or actual is None:
        return False if ":" in gold + answer else None
    expected_minutes, expected_half = clock(expected)
    actual_minutes, actual_half = clock(actual)
    halves_agree = expected_half == actual_half or not expected_half or not actual_half
    return expected_minutes == actual_minutes and halves_agree


def clock(time: re.Match[str]) -> tuple[int, str]:
    """Minutes since noon or midnight, and which: a, p, or nothing where the time does not tell."""
    hour, minutes, half = int(time[1]), time[2], (time[3] or "").lower()
    if minutes and 12 < hour < 24:
        half = "p"
    return hour % 12 * 60 + int(minutes or 0), half


def as_percent(gold: str, answer: str, judge: Judge) -> bool | None:
    """50% is 0.5, or 50 where the question asks for percent."""
    expected, actual = gold.removesuffix(r"\%"), answer.removesuffix(r"\%")
    if (expected, actual) == (gold, answer):
        return None
    if expected.endswith(r"\%") or actual.endswith(r"\%"):
        return False
    return same(expected, actual, judge) or same(as_share(gold), as_share(answer), judge)


def as_share(text: str) -> str:
    """A percentage as a fraction; any other text is itself."""
    number_of_percent = text.removesuffix(r"\%")
    return text if number_of_percent == text else rf"\frac{{{number_of_percent}}}{{100}}"


def as_numbers(gold: str, answer: str, judge: Judge) -> bool | None:
    """Exactly equal; a decimal may be rounded where none is exact."""
    expected, actual = number(gold), number(answer)
    if expected is None or actual is None:
        return False if SPACED.fullmatch(answer) else None
    gold_ends, answer_ends = has_decimals(expected), has_decimals(actual)
    if "." in gold + answer and gold_ends != answer_ends:
        # One of them has no decimal that equals it: the other is its rounding.
        return round_alike(actual, expected) if gold_ends else round_alike(expected, actual)
    return expected == actual


def as_endless(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""0.333\ldots is the number of which these are the first digits, and no decimal."""
    endless, expected = ENDLESS.fullmatch(answer), number(gold)
    if endless is None or expected is None:
        return None
    actual = number(endless[1])
    return actual is not None and not has_decimals(expected) and round_alike(expected, actual)


def as_words(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""Words are not products of letters, so that east is not seat; short ones are words where one is in \text."""
    expected, actual = WORDS.fullmatch(gold), WORDS.fullmatch(answer)
    if not expected or not actual:
        return None
    expected_word = expected[2].replace(" ", "")
    actual_word = actual[2].replace(" ", "")
    is_upright = bool(expected[1] or actual[1])
    if not is_upright and min(len(expected_word), len(actual_word)) <= 3:
        return None
    if max(len(expected_word), len(actual_word)) > 1:  # a letter alone is another one than its capital
        return expected_word.lower() == actual_word.lower()
    return expected_word == actual_word


def as_based(gold: str, answer: str, judge: Judge) -> bool | None:
    """52_8 is 52_8, and 52 where the question asks for base 8; 42 is the same number in a base not asked for."""
    expected, actual = without_name(gold), without_name(answer)
    if not BASED.match(expected) and not BASED.match(actual):
        return None
    expected, actual = plainly_based(expected), plainly_based(actual)
    return actual in (expected, expected.partition("_")[0], f"{expected}_10")


def plainly_based(text: str) -> str:
    """A number with its base as 52_8, without brackets and braces."""
    return BASED.sub(r"\1_\2", text) if "_" in text else text


def as_residues(gold: str, answer: str, judge: Judge) -> bool | None:
    """10 is 3 modulo 7; where only one tells the modulus, it is what the question tells."""
    expected, actual = RESIDUE.fullmatch(gold), RESIDUE.fullmatch(answer)
    if expected and actual:
        expected_value = number(without_name(expected[1]))
        actual_value = number(without_name(actual[1]))
        if expected[2] != actual[2]:
            return False
        has_modulus = expected[2].isdigit() and int(expected[2]) > 0
        if expected_value is not None and actual_value is not None and has_modulus:
            return (expected_value - actual_value) % int(expected[2]) == 0
        return same(expected[1], actual[1], judge)

    either = expected or actual
    if either is None:
        return None
    residue = number(without_name(either[1]))
    if residue is not None and either[2].isdigit() and residue >= int(either[2]):
        return None  # the remainder is still to be taken
    return same(expected[1] if expected else gold, actual[1] if actual else answer, judge) or None


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
    expected, actual = CASES.fullmatch(gold), CASES.fullmatch(answer)
    if not expected or not actual:
        return None
    return paired(cases(expected[1]), cases(actual[1]), lambda gold, answer: each_same(gold, answer, judge))


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

    golds, answers = solutions(gold), solutions(answer)
    if golds and answers:
        return paired(golds, answers, alike)
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
        return False
    gold, answer = POINT.sub("", gold), POINT.sub("", answer)
    gold_kind, golds = kind_and_elements(gold)
    answer_kind, answers = kind_and_elements(answer)
    if answer_kind.startswith("[") and not gold_kind and (len(answers) == 1 or NUMERIC.fullmatch(gold)):
        return False  # [5] is a list, an integral part or an interval, and no 5
    if gold_kind and answer_kind:
        return (len(golds) != 2 or gold_kind == answer_kind) and each_same(golds, answers, judge)
    if gold_kind == "()" and len(golds) == len(answers):
        return each_same(golds, answers, judge)
    return same(gold, answers[0], judge) if answer_kind == "()" and len(answers) == 1 else None


def as_ratio(gold: str, answer: str, judge: Judge) -> bool | None:
    """Term by term if there are three and more; one of two is a quotient."""
    golds, answers = split(without_name(gold), RATIO), split(without_name(answer), RATIO)
    return each_same(golds, answers, judge) if max(len(golds), len(answers)) > 2 else None


def each_same(golds: Sequence[str], answers: Sequence[str], judge: Judge) -> bool:
    """Whether two lists say the same, term by term in their order."""
    return len(golds) == len(answers) and all(same(*pair, judge) for pair in zip(golds, answers, strict=True))


def as_lists(gold: str, answer: str, judge: Judge) -> bool | None:
    """The same elements in any order, each in the answer at least as often as in the gold."""
    if holds_sets(gold) != holds_sets(answer):
        return False
    golds, answers = elements(gold), elements(answer)
    if len(golds) > 1 == len(answers):  # 8,221 are two numbers where two are asked for
        brackets = None if bracketed(gold, r"\{") else bracketed(answer, "(")  # (1,2) is no set
        answers = elements(brackets[1]) if brackets else split(answer, LIST)
    if [*golds, *answers] == [gold, answer]:
        return None

    # An element that repeats another of the answer's is no mistake; one that is in no gold is.
    remaining = list(golds)
    for element in answers:
        match = next((candidate for candidate in remaining if same(candidate, element, judge)), None)
        if match is not None:
            remaining.remove(match)
        elif not any(same(candidate, element, judge) for candidate in golds):
            return r"\cup" in gold + answer and judge(gold, answer)
    return not remaining or (r"\cup" in gold + answer and judge(gold, answer))


def as_moduli(gold: str, answer: str, judge: Judge) -> bool | None:
    """|x| < 2 is -2 < x < 2, and |x| > 2 is x < -2 or x > 2, where one says it in inequalities."""
    if "|" not in gold + answer or not (re.search(RELATION, gold) and re.search(RELATION, answer)):
        return None
    expected, actual = without_modulus(gold), without_modulus(answer)
    if (expected, actual) == (gold, answer):
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
    if not sign or not is_name(name) or r"\approx" in gold:
        return False if sign and not value else None
    return bool(value) and same(gold, f"{name} = {value}" if name else value, judge)


def as_equations(gold: str, answer: str, judge: Judge) -> bool | None:
    """x = 5 is 5, and so is 10/2 = 5; what an equation names must agree, and 5 = 3 is neither."""
    *gold_names, expected = split(gold, EQUALS)
    *answer_names, actual = split(answer, EQUALS)
    if not gold_names and not answer_names:
        return None
    if not gold_names:
        numbers = all(same(gold, side, judge) for side in answer_names if NUMERIC.fullmatch(side))
        is_linear = LINEAR.fullmatch(without_fractions(answer_names[0])) is not None
        is_unsolved = is_linear or any(re.search(UNEQUAL, side) for side in answer_names)
        return numbers and not is_unsolved and same(gold, actual, judge)
    if not answer_names:
        return is_name(gold_names[0]) and same(expected, answer, judge)

    # Both have names. With another index or argument the answer's formula may still be the gold's, renamed.
    name, other = gold_names[0], answer_names[0]
    if not is_name(name) or spelt(name) != spelt(other) or differ(INDEX, name, other):
        renamed = with_index(actual, name, other)
        return judge(gold, answer) if renamed is None else same(expected, renamed, judge)
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
    return same(rounded if is_name(exact) else exact, answer, judge)


def rounds(rounded: str, exact: str) -> bool | None:
    """Whether a decimal is what a number rounds to; None where they are no numbers."""
    decimal, value = number(rounded), number(exact)
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
