"""Whether two final answers say the same: read as text where that is plain, by math-verify where it is not.

math-verify can hang and eat memory on hostile text: `verified` belongs in a worker process (grading.py).
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from dirl_cli.reward.algebra import math_verified
from dirl_cli.reward.notation import EQUALS, LIST, RATIO, bracketed, has_decimals, number, round_alike, split
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
ASIDE = re.compile(r"_\{[^{}]*\}|_.|\([^()]*\)|\\text|[\s{}]")
INDEX = re.compile(r"_\{[^{}]*\}|_.")
ARGUMENT = re.compile(r"\(([^()]*)\)")
NAME = re.compile(r"[A-Za-z|\\':/]*(?:\^-1)?")
LINEAR = re.compile(r"(?=.*[-+\d/])[-+\d.*/ ()]*[A-Za-z](?! ?\()[-+\d.*/ ()]*")  # 2x, x/2 and x - 1, still to be solved
POINT = re.compile(r"^[A-Z] ?(?=\([^()]*,[^()]*\)$)")
SPACE = re.compile(r"(?<!\d) | (?!\d)")  # but 5 4 is not 54
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
MODULUS = re.compile(r"\| ?([a-zA-Z]) ?\|")
RELATION = r"\\[lg]e(?![a-zA-Z])|<|>"
FOR = re.compile(r",? ?(?:\\text ?\{ ?,? ?(?:where|with|for)( all| any| every| each)?[^{}]*\}|(\\forall(?![a-z]))) ?")
IN = r"\\in ?\\mathbb ?\{?[A-Z]\}?[\^_+*{}\d> ]*|(?:\\ge|>|\\ne) ?-?[0-3]"
CONDITION = re.compile(rf"(?:\\forall )?([a-zA-Z]) ?(?:{IN})?|\\forall ([a-z])")
CASES = re.compile(r"\\begin\{d?cases\}(.*)\\end\{d?cases\}", re.DOTALL)
IF = re.compile(r"^\\text ?\{ ?(?:if|for|when|where) ?\} ?|[,;. ]+$")


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
    gold, answer = (TEXT.sub(r"\1", text) if TEXT.fullmatch(text) else text for text in (gold, answer))
    verdict = decided(WORDED, gold, answer, judge)
    if verdict is not None:
        return verdict
    wanted, given = measured(gold), measured(answer)
    if wanted.differs(given):
        return False
    verdict = decided(RULES, wanted.text, given.text, judge)
    return judge(wanted.text, given.text) if verdict is None else verdict


def decided(rules: Sequence[Rule], gold: str, answer: str, judge: Judge) -> bool | None:
    """What the first rule says that can tell."""
    verdicts = (rule(gold, answer, judge) for rule in rules)
    return next((verdict for verdict in verdicts if verdict is not None), None)


def as_choice(gold: str, answer: str, judge: Judge) -> bool | None:
    """(A) is (A) 5 and Option A, but not A or B; and a, alone, unless it is e or i, which are numbers."""
    wanted, given = (UPRIGHT.sub(r"\1", text).strip() for text in (gold, answer))
    one, other = CHOICE.fullmatch(wanted), CHOICE.fullmatch(given)
    if one is None or OTHER_CHOICE.search(one[3]):
        return None
    if other is None:
        small = SMALL_CHOICE.fullmatch(given)
        return True if small and not one[3] and letter(small).upper() == letter(one) else None
    return None if OTHER_CHOICE.search(other[3]) else letter(one) == letter(other)


def letter(choice: re.Match[str]) -> str:
    return next(filter(None, choice.groups()))


def as_time(gold: str, answer: str, judge: Judge) -> bool | None:
    """4:30 p.m. is 16:30, and 4:30 where only one tells the half of the day."""
    wanted, given = TIME.fullmatch(gold), TIME.fullmatch(answer)
    if not (wanted and wanted[3]) and not (given and given[3]):
        return None
    if wanted is None or given is None:
        return False if ":" in gold + answer else None
    minutes, halves = [], []
    for time in (wanted, given):
        hour, half = int(time[1]), (time[3] or "").lower()
        minutes.append(hour % 12 * 60 + int(time[2] or 0))
        halves.append("p" if time[2] and 12 < hour < 24 else half)
    return minutes[0] == minutes[1] and (halves[0] == halves[1] or not all(halves))


def as_percent(gold: str, answer: str, judge: Judge) -> bool | None:
    """50% is 0.5, or 50 where the question asks for percent."""
    wanted, given = gold.removesuffix(r"\%"), answer.removesuffix(r"\%")
    if (wanted, given) == (gold, answer):
        return None
    if any(text.endswith(r"\%") for text in (wanted, given)):
        return False
    shares = [text if text == full else rf"\frac{{{text}}}{{100}}" for text, full in ((wanted, gold), (given, answer))]
    return same(wanted, given, judge) or same(shares[0], shares[1], judge)


def as_numbers(gold: str, answer: str, judge: Judge) -> bool | None:
    """Exactly equal; a decimal may be rounded where none is exact."""
    wanted, given = number(gold), number(answer)
    if wanted is None or given is None:
        return False if SPACED.fullmatch(answer) else None
    ends = has_decimals(wanted), has_decimals(given)
    if "." in gold + answer and ends[0] != ends[1]:
        return round_alike(given, wanted) if ends[0] else round_alike(wanted, given)
    return wanted == given


def as_endless(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""0.333\ldots is the number of which these are the first digits, and no decimal."""
    endless, wanted = ENDLESS.fullmatch(answer), number(gold)
    if endless is None or wanted is None:
        return None
    given = number(endless[1])
    return given is not None and not has_decimals(wanted) and round_alike(wanted, given)


def as_words(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""Words are not products of letters, so that east is not seat; short ones are words where one is in \text."""
    wanted, given = WORDS.fullmatch(gold), WORDS.fullmatch(answer)
    if not wanted or not given:
        return None
    words = [match[2].replace(" ", "") for match in (wanted, given)]
    if max(map(len, words)) > 1:  # a letter alone is another one than its capital
        words = [word.lower() for word in words]
    return words[0] == words[1] if wanted[1] or given[1] or min(map(len, words)) > 3 else None


def as_based(gold: str, answer: str, judge: Judge) -> bool | None:
    """52_8 is 52_8, and 52 where the question asks for base 8; 42 is the same number in a base not asked for."""
    wanted, given = without_name(gold), without_name(answer)
    if not BASED.match(wanted) and not BASED.match(given):
        return None
    wanted, given = (BASED.sub(r"\1_\2", text) if "_" in text else text for text in (wanted, given))
    return given in (wanted, wanted.partition("_")[0]) or given == f"{wanted}_10"


def without_name(text: str) -> str:
    """What is said of a name, or the text."""
    *names, value = split(text, EQUALS)
    return value if all(map(is_name, names)) else text


def as_residues(gold: str, answer: str, judge: Judge) -> bool | None:
    """10 is 3 modulo 7; where only one tells the modulus, it is what the question tells."""
    wanted, given = RESIDUE.fullmatch(gold), RESIDUE.fullmatch(answer)
    one = wanted or given
    if one is None:
        return None
    if wanted and given:
        values = number(without_name(wanted[1])), number(without_name(given[1]))
        if wanted[2] != given[2]:
            return False
        if values[0] is not None and values[1] is not None and wanted[2].isdigit() and int(wanted[2]):
            return (values[0] - values[1]) % int(wanted[2]) == 0
        return same(wanted[1], given[1], judge)
    residue = number(without_name(one[1]))
    if residue is not None and one[2].isdigit() and residue >= int(one[2]):
        return None  # the remainder is still to be taken
    return same(wanted[1] if wanted else gold, given[1] if given else answer, judge) or None


def as_conditioned(gold: str, answer: str, judge: Judge) -> bool | None:
    """What a formula's letters stand for is the question's to say; where both tell, they must say the same."""
    (wanted, first), (given, second) = conditioned(gold), conditioned(answer)
    if not first and not second:
        return None
    return (not first or not second or first == second) and same(wanted, given, judge)


def conditioned(text: str) -> tuple[str, list[str]]:
    r"""A formula and what stands after it of its letters alone, as c \in \mathbb{R} and n \ge 1."""
    text = FOR.sub(lambda found: ", \\forall " if found[1] or found[2] else ", ", text)
    text = re.sub(r" ?\(([a-zA-Z] ?(?:\\in|\\ge|\\ne|>)[^()]*)\)$", r", \1", text)
    formula, *conditions = split(text, ",")
    if re.search(rf"{RELATION}|\\(?:in|ne)(?![a-zA-Z])", formula):
        return text, []  # it is a condition itself
    found = [CONDITION.fullmatch(condition) for condition in conditions]
    bound = [(one[1] or one[2]) if one and one[0] != one[1] else None for one in found]
    if not conditions or not all(letter and re.search(rf"(?<!\\){letter}", formula) for letter in bound):
        return text, []
    return formula, [SPACE.sub("", condition) for condition in conditions]


def as_cases(gold: str, answer: str, judge: Judge) -> bool | None:
    """Each case with its condition, in any order."""
    wanted, given = CASES.fullmatch(gold), CASES.fullmatch(answer)
    if not wanted or not given:
        return None
    return paired(cases(wanted[1]), cases(given[1]), lambda one, other: in_order(one, other, judge))


def cases(rows: str) -> list[list[str]]:
    """The cells of each row, without commas and ifs."""
    return [
        [IF.sub("", IF.sub("", cell.strip())) for cell in row.split("&")] for row in rows.split(r"\\") if row.strip()
    ]


def paired(golds: Sequence[T], answers: Sequence[T], alike: Callable[[T, T], bool]) -> bool:
    """Whether each of the golds has its own answer, and no answer is left."""
    left = list(answers)
    for one in golds:
        match = next((i for i, other in enumerate(left) if alike(one, other)), None)
        if match is None:
            return False
        del left[match]
    return not left


def as_solutions(gold: str, answer: str, judge: Judge) -> bool | None:
    """Values with names, by their names; without names on one side, in the order of the names."""
    wanted, given = solutions(gold), solutions(answer)
    if wanted and given:
        return paired(
            wanted,
            given,
            lambda one, other: one.keys() == other.keys() and all(same(one[name], other[name], judge) for name in one),
        )
    if wanted:
        return same(tuples(wanted), answer, judge) or (
            len(wanted) == 1 and in_order(ordered(wanted[0]), split(answer, LIST), judge)
        )
    if given and bracketed(split(gold, LIST)[0], "("):
        return same(gold, tuples(given), judge)
    return None


def solutions(text: str) -> list[dict[str, str]] | None:
    """The values of each solution by name, as in x=1, y=2 and (x,y)=(1,2),(3,4); None if there are not two names."""
    found: list[dict[str, str]] = [{}]
    names: list[str] = []
    for part in split(text, LIST):
        *left, right = split(part, EQUALS)
        if left and (tuple_of_names := bracketed(left[0], "(")):
            names = [full(name) for name in split(tuple_of_names[1], LIST)]
        elif left and is_name(left[0]):
            name = full(left[0])
            if name in found[-1]:
                found.append({})
            found[-1][name] = right
            continue
        rows = bracketed(right, r"\{")
        for row in split(rows[1], LIST) if rows else [right]:
            values = bracketed(row, "(")
            if not names or not values or len(split(values[1], LIST)) != len(names):
                return None
            found.append(dict(zip(names, split(values[1], LIST), strict=True)))
    found = [one for one in found if one]
    return found if all(len(one) > 1 for one in found) else None


def ordered(solution: dict[str, str]) -> list[str]:
    """Its values, by the alphabet where the names follow one another there, as x and y; otherwise as written."""
    names = sorted(solution)
    follow = all(len(a) == len(b) == 1 and ord(b) == ord(a) + 1 for a, b in pairwise(names))
    return [solution[name] for name in (names if follow else solution)]


def tuples(solved: list[dict[str, str]]) -> str:
    return ", ".join(f"({', '.join(ordered(one))})" for one in solved)


def as_brackets(gold: str, answer: str, judge: Judge) -> bool | None:
    """Tuples, columns and intervals in their order; the kind of bracket counts for two elements, as in an interval."""
    if AT_INFINITY.search(answer) and not AT_INFINITY.search(gold):
        return False
    gold, answer = POINT.sub("", gold), POINT.sub("", answer)
    wanted, given = bracketed(gold), bracketed(answer)
    kinds = [found and found[0] + found[2] for found in (wanted, given)]
    golds, answers = (split(found[1] if found else text, LIST) for found, text in ((wanted, gold), (given, answer)))
    if given and not wanted and given[0] == "[" and (len(answers) == 1 or NUMERIC.fullmatch(gold)):
        return False  # [5] is a list, an integral part or an interval, and no 5
    if wanted and given:
        return (len(golds) != 2 or kinds[0] == kinds[1]) and in_order(golds, answers, judge)
    if kinds[0] == "()" and len(golds) == len(answers):
        return in_order(golds, answers, judge)
    return same(gold, answers[0], judge) if kinds[1] == "()" and len(answers) == 1 else None


def as_ratio(gold: str, answer: str, judge: Judge) -> bool | None:
    """Term by term if there are three and more; one of two is a quotient."""
    golds, answers = split(without_name(gold), RATIO), split(without_name(answer), RATIO)
    return in_order(golds, answers, judge) if max(len(golds), len(answers)) > 2 else None


def in_order(golds: Sequence[str], answers: Sequence[str], judge: Judge) -> bool:
    return len(golds) == len(answers) and all(same(*pair, judge) for pair in zip(golds, answers, strict=True))


def as_lists(gold: str, answer: str, judge: Judge) -> bool | None:
    """The same elements in any order, each in the answer at least as often as in the gold."""
    if holds_sets(gold) != holds_sets(answer):
        return False
    golds, answers = elements(gold), elements(answer)
    if len(golds) > 1 == len(answers):  # 8,221 are two numbers where two are asked for
        found = None if bracketed(gold, r"\{") else bracketed(answer, "(")  # (1,2) is no set
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


def holds_sets(text: str) -> bool:
    """Whether it is a set of which an element is a set."""
    if text.count(r"\{") < 2 or (found := bracketed(without_name(text), r"\{")) is None:
        return False
    return any(bracketed(part, r"\{") for part in split(found[1], LIST))


def as_moduli(gold: str, answer: str, judge: Judge) -> bool | None:
    """|x| < 2 is -2 < x < 2, and |x| > 2 is x < -2 or x > 2, where one says it in inequalities."""
    if "|" not in gold + answer or not (re.search(RELATION, gold) and re.search(RELATION, answer)):
        return None
    wanted, given = without_modulus(gold), without_modulus(answer)
    if (wanted, given) == (gold, answer):
        return None
    return same(wanted, given, judge)


def without_modulus(text: str) -> str:
    """The same inequality of a letter's modulus and a positive number, of the letter alone."""
    (small, *rest), signs = ascending(text)
    if len(rest) != 1 or len(signs) != 1:
        return text
    [large], [sign] = rest, signs
    bounded, beyond = MODULUS.fullmatch(small), MODULUS.fullmatch(large)
    bound = number(large if bounded else small)
    if bound is None or bound <= 0:
        return text
    if bounded:
        return f"-{large} {sign} {bounded[1]} {sign} {large}"
    return f"{beyond[1]} {sign} -{small}, {small} {sign} {beyond[1]}" if beyond else text


def as_inequalities(gold: str, answer: str, judge: Judge) -> bool | None:
    """3 > x > 1 is 1 < x < 3; what differs in more is for algebra."""
    (terms, signs), (others, theirs) = ascending(gold), ascending(answer)
    if not signs or signs != theirs:
        return None
    return in_order(terms, others, judge) or None


def ascending(text: str) -> tuple[list[str], list[str]]:
    """The terms and the signs of a chain of inequalities, the least first."""
    terms, signs = split(text, RELATION), re.findall(RELATION, text)
    if len(terms) != len(signs) + 1:
        return [text], []
    if all(sign in (">", r"\ge") for sign in signs):
        return terms[::-1], [sign.replace(">", "<").replace("ge", "le") for sign in reversed(signs)]
    return terms, signs


def as_near(gold: str, answer: str, judge: Judge) -> bool | None:
    r"""x \approx 5 is judged as x = 5 is, by its digits: they are right where they are the gold's."""
    name, sign, value = map(str.strip, answer.partition(r"\approx"))
    if not sign or not is_name(name) or r"\approx" in gold:
        return False if sign and not value else None
    return bool(value) and same(gold, f"{name} = {value}" if name else value, judge)


def as_equations(gold: str, answer: str, judge: Judge) -> bool | None:
    """x = 5 is 5, and so is 10/2 = 5; what an equation names must agree, and 5 = 3 is neither."""
    (*names, value), (*others, given) = split(gold, EQUALS), split(answer, EQUALS)
    if not names and not others:
        return None
    if not names:
        numbers = all(same(gold, part, judge) for part in others if NUMERIC.fullmatch(part))
        unsolved = LINEAR.fullmatch(without_fractions(others[0])) or any(re.search(UNEQUAL, part) for part in others)
        return numbers and not unsolved and same(gold, given, judge)
    if not others:
        return is_name(names[0]) and same(value, answer, judge)
    if not is_name(names[0]) or spelt(names[0]) != spelt(others[0]) or differ(INDEX, names[0], others[0]):
        renamed = with_index(given, names[0], others[0])
        return judge(gold, answer) if renamed is None else same(value, renamed, judge)
    if differ(ARGUMENT, names[0], others[0]):
        renamed = with_argument(given, ARGUMENT.findall(others[0]), ARGUMENT.findall(names[0]))
        return renamed is not None and same(value, renamed, judge)
    return same(value, given, judge)


def without_fractions(text: str) -> str:
    return re.sub(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"(\1)/(\2)", text)


def is_name(text: str) -> bool:
    """Whether an answer may be called this: x, f(x), m_1, (x, y), AB or nothing."""
    return NAME.fullmatch(ASIDE.sub("", text)) is not None


def spelt(name: str) -> str:
    """A name without its index and argument, in small letters."""
    return ASIDE.sub("", name).lower()


def full(name: str) -> str:
    """A name with its index."""
    return spelt(name) + "".join(re.sub(r"\\text|[{}\s]", "", index) for index in INDEX.findall(name))


def differ(part: re.Pattern[str], name: str, other: str) -> bool:
    """Whether two names have different indices or arguments; a name may do without."""
    one, two = ([re.sub(r"\\text|\\|[{}\s]", "", found) for found in part.findall(text)] for text in (name, other))
    return bool(one and two and one != two)


def with_index(formula: str, name: str, other: str) -> str | None:
    """The formula of a sequence of another index, as 2^k of a_k becomes 2^n; None where it is no such formula."""
    new, old = INDEX.findall(name), INDEX.findall(other)
    if spelt(name) != spelt(other) or len(new) != 1 or len(old) != 1:
        return None
    letters = [re.sub(r"[_{}\s]", "", index) for index in (new[0], old[0])]
    if not all(re.fullmatch("[a-z]", letter) for letter in letters):
        return None
    if not re.search(rf"(?<![a-zA-Z\\]){letters[1]}", formula):
        return None  # as in x_i = 5, where it tells which
    return with_argument(formula, [letters[1]], [letters[0]])


def with_argument(formula: str, old: list[str], new: list[str]) -> str | None:
    """The formula of other variables, as t^2 of t becomes x^2; None where x has a meaning already."""
    before, after = (re.sub(r"\s", "", ",".join(names)).split(",") for names in (old, new))
    if len(before) != len(after) or not all(re.fullmatch("[a-zA-Z]", name) for name in (*before, *after)):
        return None
    renamed = dict(zip(before, after, strict=True))
    tokens = re.findall(r"\\[a-zA-Z]+|.", formula, re.DOTALL)
    if any(name in tokens and name not in renamed for name in after):
        return None
    return "".join(renamed.get(token, token) for token in tokens)


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
    near, value = number(rounded), number(exact)
    if near is None or value is None:
        return None
    return round(value, len(rounded.partition(".")[2])) == near


WORDED: tuple[Rule, ...] = (as_choice, as_time)  # for these the words count that stand beside
RULES: tuple[Rule, ...] = (
    *(as_percent, as_numbers, as_words, as_residues, as_based, as_endless, as_conditioned, as_cases, as_solutions),
    *(as_brackets, as_ratio, as_moduli, as_lists, as_inequalities, as_near, as_equations, as_rounded),
)


def unclear(gold: str, answer: str) -> bool:
    raise Unclear
