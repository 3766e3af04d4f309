"""Whether two final answers say the same: quickly where that is plain, by math-verify where it is not.

math-verify can hang and eat memory on hostile text: `verified` belongs in a worker process (grading.py).
"""

import re

INTEGER = re.compile(r"[+-]?\d{1,30}")
WORD = re.compile(r"(?:\\text\{)?\s*([A-Za-z]{4,})\s*\}?")
BASE = re.compile(r"_\{?(\d+)\}?$")
UNIT = re.compile(r"([-+]?[\d.,]*\d)\s+(?!pi\b)[A-Za-z]{2,}(?:\^\{?\d\}?)?")
DOLLAR = re.compile(r"(?<!\\)\$")
WRAPPING = re.compile(r"^(?:\*\*|`|\\\(|\s)+|(?:\*\*|`|\\\)|\s|(?<!\\)[.,;:])+$")
PERCENT = re.compile(r"\s*\\?%$")
THIN_SPACE = re.compile(r"(?<=\d)\\[,!;:](?=\d{3}(?!\d))")


def plainly_equal(gold: str, answer: str) -> bool | None:
    """The verdict where both are whole numbers or the same text, else None."""
    if gold == answer:
        return bool(gold)
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    return None


def tidy(answer: str) -> str:
    """The answer without what carries no meaning: dollar signs, wrapping, final punctuation, percent signs, a unit."""
    answer = PERCENT.sub("", WRAPPING.sub("", DOLLAR.sub("", answer).strip()))
    unit = UNIT.fullmatch(answer)
    return unit[1] if unit else THIN_SPACE.sub("", answer)


def verified(gold: str, answer: str) -> bool:
    """Whether math-verify holds `answer` for `gold`, after the cases in which it would be too kind."""
    from math_verify import LatexExtractionConfig, parse, verify

    gold, answer = tidy(gold), tidy(answer)
    plain = plainly_equal(gold, answer)
    if plain is not None:
        return plain
    words = WORD.fullmatch(gold), WORD.fullmatch(answer)
    if words[0] and words[1]:  # read as products of letters, east would equal seat
        return words[0][1].lower() == words[1][1].lower()
    bases = BASE.search(gold), BASE.search(answer)
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:  # the subscript would be dropped
        return False
    # In a box and as LaTeX only: the search for loose expressions takes the last number of a text for its answer.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [parse(rf"\boxed{{{text}}}", config, parsing_timeout=None) for text in (gold, answer)]
    return verify(*parsed, timeout_seconds=None)
