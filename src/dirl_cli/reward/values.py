r"""Rules for answers that are one value: a choice, a time, a number, a word. They read the text and nothing else.

The rules for what has parts are in equality.py: those compare part by part, with all the rules again.
"""

import re
from collections.abc import Callable

from dirl_cli.reward.names import without_name
from dirl_cli.reward.notation import has_decimals, number, round_alike

Judge = Callable[[str, str], bool]
Rule = Callable[[str, str, Judge], bool | None]
"""Reads a gold and an answer in one way; None where it has nothing to say. The judge decides what no rule can tell."""

WORDS = re.compile(r"(\\text ?\{ ?)?(?:(?:an?|the) )?([A-Za-z][A-Za-z' -]*)\}?")
BASED = re.compile(r"\(?((?=[A-F]*\d)[\dA-F]+)\)? ?_ ?\{? ?(?:\\text ?\{)?(\d+)\}*$")
ENDLESS = re.compile(r"(.*[\d}]) ?(?:\.\.\.|\\ldots)")
SPACED = re.compile(r"[-+]?\d+(?: \d+)+")
CALLED = "(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)? ?:? ?)?"
CHOICE = re.compile(rf"{CALLED}(?-i:\(([A-J])\)|([A-J])(?=[).:]|$)) ?[).:]? ?(.*)", re.IGNORECASE)
UPRIGHT = re.compile(r"\\text ?\{([^{}]*)\}")
SMALL_CHOICE = re.compile(rf"{CALLED}(?-i:\(([a-hj])\)|([a-hj])(?=[).:])|([a-df-hj])(?=$)) ?[).:]?", re.IGNORECASE)
OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])(?:[A-J](?![A-Za-z])|not\b|or\b|nor\b)")
TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))? ?(?:\\text ?\{ ?)?(?:([ap])\.? ?m\.?)?(?: ?\})?", re.IGNORECASE)


def as_choice(gold: str, answer: str, judge: Judge) -> bool | None:
    """(A) is (A) 5 and Option A, but not A or B; and a, alone, unless it is e or i, which are numbers."""
    expected_text = UPRIGHT.sub(r"\1", gold).strip()
    actual_text = UPRIGHT.sub(r"\1", answer).strip()
    expected = CHOICE.fullmatch(expected_text)
    actual = CHOICE.fullmatch(actual_text)
    if expected is None or OTHER_CHOICE.search(expected[3]):
        return None
    if actual is None:
        # A small letter may be a variable: it is a choice where the gold is no more than a letter, and the same one.
        small = SMALL_CHOICE.fullmatch(actual_text)
        if small and not expected[3] and letter(small).upper() == letter(expected):
            return True
        return None
    if OTHER_CHOICE.search(actual[3]):
        return None
    return letter(expected) == letter(actual)


def letter(choice: re.Match[str]) -> str:
    return next(filter(None, choice.groups()))


def as_time(gold: str, answer: str, judge: Judge) -> bool | None:
    """4:30 p.m. is 16:30, and 4:30 where only one tells the half of the day."""
    expected = TIME.fullmatch(gold)
    actual = TIME.fullmatch(answer)
    # 4:30 may be a ratio, and 4 any number: one of the two has to say a.m. or p.m.
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
    hour = int(time[1])
    minutes = time[2]
    half = (time[3] or "").lower()
    if minutes and 12 < hour < 24:
        half = "p"
    return hour % 12 * 60 + int(minutes or 0), half


def as_numbers(gold: str, answer: str, judge: Judge) -> bool | None:
    """Exactly equal; a decimal may be rounded where none is exact."""
    expected = number(gold)
    actual = number(answer)
    if expected is None or actual is None:
        return False if SPACED.fullmatch(answer) else None  # 1 2 3 are several: the judge would multiply them

    # Where one of them has no decimal that equals it, the other may be its rounding: which is rounded counts.
    gold_ends = has_decimals(expected)
    answer_ends = has_decimals(actual)
    if "." in gold + answer and gold_ends != answer_ends:
        if gold_ends:
            return round_alike(actual, expected)
        return round_alike(expected, actual)
    return expected == actual


def as_endless(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""0.333\ldots is the number of which these are the first digits, and no decimal."""
    endless = ENDLESS.fullmatch(answer)
    expected = number(gold)
    if endless is None or expected is None:
        return None
    actual = number(endless[1])
    return actual is not None and not has_decimals(expected) and round_alike(expected, actual)


def as_words(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""Words are not products of letters, so that east is not seat; short ones are words where one is in \text."""
    expected = WORDS.fullmatch(gold)
    actual = WORDS.fullmatch(answer)
    if not expected or not actual:
        return None
    expected_word = expected[2].replace(" ", "")
    actual_word = actual[2].replace(" ", "")
    is_upright = bool(expected[1] or actual[1])
    # Up to three letters in italics may be a product, whose factors come in any order: that is for algebra.
    if not is_upright and min(len(expected_word), len(actual_word)) <= 3:
        return None
    if max(len(expected_word), len(actual_word)) > 1:  # a letter alone is another one than its capital
        return expected_word.lower() == actual_word.lower()
    return expected_word == actual_word


def as_based(gold: str, answer: str, judge: Judge) -> bool | None:
    """52_8 is 52_8, and 52 where the question asks for base 8; 42 is the same number in a base not asked for."""
    expected = without_name(gold)
    actual = without_name(answer)
    if not BASED.match(expected) and not BASED.match(actual):
        return None
    expected = plainly_based(expected)
    digits = expected.partition("_")[0]
    return plainly_based(actual) in (expected, digits, f"{expected}_10")


def plainly_based(text: str) -> str:
    """A number with its base as 52_8, without brackets and braces."""
    if "_" not in text:
        return text
    return BASED.sub(r"\1_\2", text)
