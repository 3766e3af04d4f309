"""Names in an answer, as the f(x) of f(x) = 2x: whether two of them mean the same, and formulas with others in them."""

import re

from dirl_cli.reward.notation import EQUALS, split

ASIDE = re.compile(r"_\{[^{}]*\}|_.|\([^()]*\)|\\text|[\s{}]")
INDEX = re.compile(r"_\{[^{}]*\}|_.")
ARGUMENT = re.compile(r"\(([^()]*)\)")
NAME = re.compile(r"[A-Za-z|\\':/]*(?:\^-1)?")


def without_name(text: str) -> str:
    """What is said of a name, or the text."""
    *names, value = split(text, EQUALS)
    return value if all(map(is_name, names)) else text


def is_name(text: str) -> bool:
    """Whether an answer may be called this: x, f(x), m_1, (x, y), AB or nothing."""
    return NAME.fullmatch(ASIDE.sub("", text)) is not None


def spelt(name: str) -> str:
    """A name without its index and argument, in small letters."""
    return ASIDE.sub("", name).lower()


def full(name: str) -> str:
    """A name with its index."""
    return spelt(name) + "".join(re.sub(r"\\text|[{}\s]", "", index) for index in INDEX.findall(name))


def differ(pattern: re.Pattern[str], name: str, other: str) -> bool:
    """Whether two names have different indices or arguments; a name may do without. pattern: INDEX or ARGUMENT."""
    matches, other_matches = plain_matches(pattern, name), plain_matches(pattern, other)
    return bool(matches and other_matches and matches != other_matches)


def plain_matches(pattern: re.Pattern[str], name: str) -> list[str]:
    """The indices or arguments of a name, without formatting."""
    return [re.sub(r"\\text|\\|[{}\s]", "", match) for match in pattern.findall(name)]


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
