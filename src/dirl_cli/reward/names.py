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
    if not all(map(is_name, names)):
        return text
    return value


def is_name(text: str) -> bool:
    """Whether an answer may be called this: x, f(x), m_1, (x, y), AB or nothing."""
    return NAME.fullmatch(ASIDE.sub("", text)) is not None


def spelt(name: str) -> str:
    """A name without its index and argument, in small letters."""
    return ASIDE.sub("", name).lower()


def full(name: str) -> str:
    """A name with its index."""
    indices = "".join(INDEX.findall(name))
    return spelt(name) + re.sub(r"\\text|[{}\s]", "", indices)


def differ(pattern: re.Pattern[str], name: str, other: str) -> bool:
    """Whether two names have different indices or arguments; a name may do without. pattern: INDEX or ARGUMENT."""
    matches = plain_matches(pattern, name)
    other_matches = plain_matches(pattern, other)
    return bool(matches and other_matches and matches != other_matches)


def plain_matches(pattern: re.Pattern[str], name: str) -> list[str]:
    """The indices or arguments of a name, without formatting."""
    return [re.sub(r"\\text|\\|[{}\s]", "", match) for match in pattern.findall(name)]


def with_index(formula: str, name: str, other: str) -> str | None:
    """The formula of a sequence of another index, as 2^k of a_k becomes 2^n; None where it is no such formula."""
    new_indices = INDEX.findall(name)
    old_indices = INDEX.findall(other)
    if spelt(name) != spelt(other) or len(new_indices) != 1 or len(old_indices) != 1:
        return None
    new = re.sub(r"[_{}\s]", "", new_indices[0])
    old = re.sub(r"[_{}\s]", "", old_indices[0])
    if not re.fullmatch("[a-z]", new) or not re.fullmatch("[a-z]", old):
        return None
    if not re.search(rf"(?<![a-zA-Z\\]){old}", formula):
        return None  # as in x_i = 5, where it tells which
    return with_argument(formula, [old], [new])


def with_argument(formula: str, old: list[str], new: list[str]) -> str | None:
    """The formula of other variables, as t^2 of t becomes x^2; None where x has a meaning already."""
    before = re.sub(r"\s", "", ",".join(old)).split(",")
    after = re.sub(r"\s", "", ",".join(new)).split(",")
    if len(before) != len(after) or not all(re.fullmatch("[a-zA-Z]", name) for name in (*before, *after)):
        return None

    # Commands are one token each, so that the a of \alpha is no variable.
    renamed = dict(zip(before, after, strict=True))
    tokens = re.findall(r"\\[a-zA-Z]+|.", formula, re.DOTALL)
    if any(name in tokens and name not in renamed for name in after):
        return None
    return "".join(renamed.get(token, token) for token in tokens)
