"""Whether two final answers say the same: read as text where that is plain, by math-verify where it is not.

math-verify can hang and eat memory on hostile text: `verified` belongs in a worker process (grading.py).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

from dirl_cli.reward.notation import EQUALS, LIST, RATIO, bracketed, number, split, tidy, without_unit

Judge = Callable[[str, str], bool]

PLAIN = 200  # characters; a longer answer is compared in a worker process, whatever it holds
DECIMALS = 6  # to which a decimal must agree with a number that no decimal equals, as in math-verify

TEXT = re.compile(r"\\text ?\{([^{}]*[\d(][^{}]*)\}")
WORDS = re.compile(r"(\\text ?\{ ?)?(?:(?:an?|the) )?([A-Za-z][A-Za-z' -]*)\}?")
BASED = re.compile(r"\(?((?=[A-F]*\d)[\dA-F]+)\)? ?_ ?\{? ?(?:\\text ?\{)?(\d+)\}*$")
NUMERIC = re.compile(r"(?:[\d\s.,+*/^(){}!-]|\\(?:frac|sqrt|cdot|times|pi)(?![a-zA-Z]))+")
ASIDE = re.compile(r"_\{[^{}]*\}|_.|\([^()]*\)|\\text|[\s{}']")
NAME = re.compile(r"[A-Za-z|\\]*")
SPACE = re.compile(r"(?<!\d) | (?!\d)")  # but 5 4 is not 54
SPACED = re.compile(r"[-+]?\d+(?: \d+)+")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


WORD = re.compile(r"-?(?:(?:Integer|Float|Rational|Symbol|Function) *)?\(? *'?[\w.+-]*'? *\)? *")  # as sympy writes it


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
    """As `same`, of texts as they were written; where ', ' separates, other commas may be those of thousands."""
    gold, answer = tidy(gold), tidy(answer)
    wanted, given = (THOUSANDS.sub("", text) if ", " in text else text for text in (gold, answer))
    return same(gold, answer, judge) or ((wanted, given) != (gold, answer) and same(wanted, given, judge))


def same(gold: str, answer: str, judge: Judge) -> bool:
    """Whether two tidy texts say the same: the first rule that can tell decides, or else the judge."""
    if SPACE.sub("", gold) == SPACE.sub("", answer):
        return bool(gold)
    texts = [TEXT.sub(r"\1", text) if TEXT.fullmatch(text) else text for text in (gold, answer)]
    (gold, unit), (answer, other) = map(without_unit, texts)
    if unit and other and unit != other:
        return False
    verdicts = (rule(gold, answer, judge) for rule in RULES)
    verdict = next((verdict for verdict in verdicts if verdict is not None), None)
    return judge(gold, answer) if verdict is None else verdict


def as_percent(gold: str, answer: str, judge: Judge) -> bool | None:
    """50% is 0.5, or 50 where the question asks for percent."""
    wanted, given = gold.removesuffix(r"\%"), answer.removesuffix(r"\%")
    if (wanted, given) == (gold, answer):
        return None
    shares = [text if text == full else rf"\frac{{{text}}}{{100}}" for text, full in ((wanted, gold), (given, answer))]
    return same(wanted, given, judge) or same(shares[0], shares[1], judge)


def as_numbers(gold: str, answer: str, judge: Judge) -> bool | None:
    """Exactly equal; a decimal may be rounded where none is exact."""
    wanted, given = number(gold), number(answer)
    if wanted is None or given is None:
        return False if SPACED.fullmatch(answer) else None
    endless = [(value * 10**99).denominator > 1 for value in (wanted, given)]
    if "." in gold + answer and endless[0] != endless[1]:
        return round(wanted, DECIMALS) == round(given, DECIMALS)
    return wanted == given


def as_words(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""Words are not products of letters, so that east is not seat; short ones are words where one is in \text."""
    wanted, given = WORDS.fullmatch(gold), WORDS.fullmatch(answer)
    if not wanted or not given:
        return None
    words = [match[2].lower().replace(" ", "") for match in (wanted, given)]
    return words[0] == words[1] if wanted[1] or given[1] or min(map(len, words)) > 3 else None


def as_based(gold: str, answer: str, judge: Judge) -> bool | None:
    """52_8 is 52_8, and 52 where the question asks for base 8; 42 is the same number in a base not asked for."""
    if not BASED.match(gold) and not BASED.match(answer):
        return None
    wanted, given = (BASED.sub(r"\1_\2", text) if "_" in text else text for text in (gold, answer))
    return given in (wanted, wanted.partition("_")[0]) or given == f"{wanted}_10"


def as_brackets(gold: str, answer: str, judge: Judge) -> bool | None:
    """Tuples, columns and intervals in their order; the kind of bracket counts for two elements, as in an interval."""
    wanted, given = bracketed(gold), bracketed(answer)
    kinds = [found and found[0] + found[2] for found in (wanted, given)]
    golds, answers = (split(found[1] if found else text, LIST) for found, text in ((wanted, gold), (given, answer)))
    if wanted and given:
        return (len(golds) != 2 or kinds[0] == kinds[1]) and in_order(golds, answers, judge)
    if kinds[0] == "()" and len(golds) == len(answers):
        return in_order(golds, answers, judge)
    return same(gold, answers[0], judge) if kinds[1] == "()" and len(answers) == 1 else None


def as_ratio(gold: str, answer: str, judge: Judge) -> bool | None:
    """Term by term if there are three and more; one of two is a quotient."""
    golds, answers = split(gold, RATIO), split(answer, RATIO)
    return in_order(golds, answers, judge) if max(len(golds), len(answers)) > 2 else None


def in_order(golds: Sequence[str], answers: Sequence[str], judge: Judge) -> bool:
    return len(golds) == len(answers) and all(same(*pair, judge) for pair in zip(golds, answers, strict=True))


def as_lists(gold: str, answer: str, judge: Judge) -> bool | None:
    """The same elements in any order, each in the answer at least as often as in the gold."""
    golds, answers = elements(gold), elements(answer)
    if len(golds) > 1 == len(answers):  # 8,221 are two numbers where two are asked for
        found = bracketed(answer, "(")
        answers = elements(found[1]) if found else split(answer, LIST)
    if [*golds, *answers] == [gold, answer]:
        return None
    left = list(golds)
    for one in answers:
        match = next((other for other in left if same(other, one, judge)), None)
        if match is not None:
            left.remove(match)
        elif not any(same(other, one, judge) for other in golds):
            return r"\cup" in gold + answer and judge(gold, answer)
    return not left or (r"\cup" in gold + answer and judge(gold, answer))


def elements(text: str) -> list[str]:
    r"""What a list, a set or a union of intervals holds, ± as two; a text that is none of these holds itself."""
    parts = split(text, LIST) if number(text) is None else [text]  # 1,000 is one
    *names, value = split(text, EQUALS)
    if len(parts) == 1 and all(map(is_name, names)) and (found := bracketed(value, r"\{")):
        return elements(found[1])
    both = ([part.replace(r"\pm", plus).replace(r"\mp", minus) for plus, minus in ("+-", "-+")] for part in parts)
    return [one for signed in both for one in dict.fromkeys(signed)]


def as_equations(gold: str, answer: str, judge: Judge) -> bool | None:
    """x = 5 is 5, and so is 10/2 = 5; what an equation names must agree, and 5 = 3 is neither."""
    (*names, value), (*others, given) = split(gold, EQUALS), split(answer, EQUALS)
    if not names and not others:
        return None
    if not names:
        return all(same(gold, part, judge) for part in others if NUMERIC.fullmatch(part)) and same(gold, given, judge)
    if not others:
        return is_name(names[0]) and same(value, answer, judge)
    if is_name(names[0]) and ASIDE.sub("", names[0]).lower() == ASIDE.sub("", others[0]).lower():
        return same(value, given, judge)
    return judge(gold, answer)


def is_name(text: str) -> bool:
    """Whether an answer may be called this: x, f(x), m_1, (x, y), AB or nothing."""
    return NAME.fullmatch(ASIDE.sub("", text)) is not None


def as_rounded(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""Where the gold is given with \approx, its decimals are those that count."""
    exact, sign, rounded = map(str.strip, gold.partition(r"\approx"))
    if not sign:
        return None
    near, value = number(rounded), number(answer)
    if near is not None and value is not None and round(value, len(rounded.partition(".")[2])) == near:
        return True
    return same(rounded if is_name(exact) else exact, answer, judge)


RULES = (as_percent, as_numbers, as_words, as_based, as_brackets, as_ratio, as_lists, as_equations, as_rounded)


def unclear(gold: str, answer: str) -> bool:
    raise Unclear


@lru_cache(maxsize=4096)
def math_verified(gold: str, answer: str) -> bool:
    """Whether math-verify holds `answer` for `gold`."""
    keep_from_evaluating()
    from math_verify import verify

    return verify(parsed(gold), parsed(answer), allow_set_relation_comp=True, timeout_seconds=None)


@cache
def keep_from_evaluating() -> None:
    """Sympy gives numbers that it is handed as text to `eval`: from now on these and single names only."""
    from sympy.parsing import sympy_parser

    evaluate = sympy_parser.eval_expr

    def evaluate_word(code: str, *names: Any) -> Any:
        if not WORD.fullmatch(code):
            raise ValueError(f"{code[:40]} is not evaluated")
        return evaluate(code, *names)

    sympy_parser.eval_expr = evaluate_word


@lru_cache(maxsize=4096)
def parsed(text: str) -> list[Any]:
    """What math-verify reads: as LaTeX in a box only, since it takes the last number of loose text for its answer."""
    from math_verify import LatexExtractionConfig, parse

    latex = LatexExtractionConfig(boxed_match_priority=0)
    latex = replace(latex, normalization_config=replace(latex.normalization_config, units=False))  # 2d is not 2
    return parse(rf"\boxed{{{text}}}", [latex], parsing_timeout=None)
