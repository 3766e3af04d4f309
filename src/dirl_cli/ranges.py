"""Which values a setting may have: stated in its type, as in `steps: Count`, checked and described here.

A type that is not checked by OmegaConf's conversion alone is `Annotated` with a `Range` or a `OneOf`. The types here
have names; what only one setting has, such as a remark on how to switch it off, stands where that setting does.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite, isnan
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from dirl_cli.errors import DirlError, did_you_mean


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be: finite ones, and inf where `infinite`.

    whole_from_one: whether numbers from 1 on must be whole. remark: what the sentence adds, such as how to switch off.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    infinite: bool = False
    whole_from_one: bool = False
    remark: str = ""

    def holds(self, number: float) -> bool:
        """Whether a number is one of them."""
        is_whole = isinstance(number, int)  # and perhaps larger than any float
        if not is_whole and (isnan(number) or not (self.infinite or isfinite(number))):
            return False
        if self.whole_from_one and number >= 1 and number != int(number):
            return False
        if self.at_least is not None and number < self.at_least:
            return False
        if self.above is not None and number <= self.above:
            return False
        if self.at_most is not None and number > self.at_most:
            return False
        return self.below is None or number < self.below

    def describe(self, noun: str) -> str:
        """Such as: a whole number of at least 1. noun: `whole number` or `number`."""
        limits = {
            "of at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        bounds = []
        for words, limit in limits.items():
            if limit is not None:
                digits = f"{limit:g}" if abs(limit) < 1e6 else f"{limit}"  # in full: 4294967295, not 4.29497e+09
                bounds.append(f"{words} {digits}")
        if self.whole_from_one:
            noun = "share below 1, or a whole number"
        sentence = f"a finite {noun}"
        if bounds:
            sentence = f"a {noun} {' and '.join(bounds)}"
        if self.remark:
            sentence += f"; {self.remark}"
        return sentence


class OneOf:
    """The words that a setting may be, true and false among them where they are given.

    pattern: a regular expression of further ones. meant: the word that is meant by one that looks more like another,
    as `gpu` looks like `cpu`.
    """

    def __init__(self, *words: str | bool, pattern: str = "", meant: Mapping[str, str] | None = None) -> None:
        self.words = words
        self.pattern = pattern
        self.meant = meant or {}

    def holds(self, word: str | bool) -> bool:
        """Whether the setting may be this word."""
        if any(word == one and type(word) is type(one) for one in self.words):
            return True
        return isinstance(word, str) and bool(self.pattern and re.fullmatch(self.pattern, word))

    def hint(self, word: str) -> str:
        """Which word was probably meant, to append to an error."""
        if word in self.meant:
            return f"did you mean {self.meant[word]}?"
        return did_you_mean(word, map(format_value, self.words))


Count = Annotated[int, Range(at_least=1)]
Natural = Annotated[int, Range(at_least=0)]
Seed = Annotated[int, Range(at_least=0, at_most=2**32 - 1)]  # what every generator of numbers takes
AnswerSeed = Annotated[int, Range(at_least=0, at_most=2**63 - 1)]  # of which only a hash is taken
Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
SomeShare = Annotated[float, Range(above=0, at_most=1)]
ShareBelowOne = Annotated[float, Range(at_least=0, below=1)]
InnerShare = Annotated[float, Range(above=0, below=1)]
ShareOrCount = Annotated[float, Range(at_least=0, whole_from_one=True)]

DEVICES = OneOf("auto", "cpu", "cuda", pattern=r"cuda:\d+", meant={"gpu": "cuda"})
DTYPES = OneOf("auto", "float32", "bfloat16")
ATTENTIONS = OneOf("auto", "sdpa", "flex", "tiles")
COMPILING = OneOf("auto", True, False)
CHECKPOINTING = OneOf(False, True, "attention")
Device = Annotated[str, DEVICES]
Dtype = Annotated[str, DTYPES]
Attention = Annotated[str, ATTENTIONS]
Compiling = Annotated[Any, COMPILING]
Checkpointing = Annotated[Any, CHECKPOINTING]


def require(value: object, hint: Any, key: str = "") -> None:
    """Raises DirlError that names the setting where its type does not allow its value.

    value: as OmegaConf converted it, in plain containers. hint: its type, with annotations. key: its full name.
    """
    for name, leaf, leaf_type in constrained_values(value, hint, key):
        is_container = isinstance(leaf, list)  # which OmegaConf takes for a number in a mapping
        if is_container or not limit_of(leaf_type).holds(leaf):
            raise DirlError(refusal(name, leaf, leaf_type))


def require_fields(built: Any, group: str) -> None:
    """Raises DirlError where a field of a dataclass has a value that its type does not allow.

    group: the key of the dataclass, for the sentence.
    """
    require(vars(built), type(built), group)


def constrained_values(value: Any, hint: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, value and type of everything in `value` whose type says more than OmegaConf's conversion checks.

    Raises DirlError for a list of another length than its type says.
    """
    inner = without_none(hint)
    if value is None or inner is Any:
        return
    # OmegaConf takes a mapping for a number inside a mapping: what is wrong, the class itself tells better.
    if isinstance(value, dict) and get_origin(inner) is Annotated:
        return

    if get_origin(inner) is Annotated:
        yield key, value, hint
    elif is_dataclass(inner):
        types = types_of(inner)
        for name in [name for name in types if name in value]:
            yield from constrained_values(value[name], types[name], f"{key}.{name}".lstrip("."))
    elif get_origin(inner) is dict:
        for name, item in value.items():
            yield from constrained_values(item, get_args(inner)[1], f"{key}.{name}")
    elif get_origin(inner) in (list, tuple):
        if required_length(inner) not in (None, len(value)):
            raise DirlError(refusal(key, value, inner))
        for i, item in enumerate(value):
            yield from constrained_values(item, get_args(inner)[0], f"{key}[{i}]")


def require_shape(value: Any, hint: Any, key: str) -> None:
    """Raises DirlError for a mapping where a list belongs or the reverse, of which OmegaConf does not say where.

    hint: the type of `value`, with annotations. key: its full name.
    """
    inner = without_none(hint)
    is_list = get_origin(inner) in (list, tuple)
    is_mapping = get_origin(inner) is dict or is_dataclass(inner)
    if (is_list and isinstance(value, dict)) or (is_mapping and isinstance(value, list)):
        raise DirlError(refusal(key, value, hint))

    if is_list and isinstance(value, list):
        for i, item in enumerate(value):
            require_shape(item, get_args(inner)[0], f"{key}[{i}]")
    if is_dataclass(inner) and isinstance(value, dict):
        types = types_of(inner)
        for name in [name for name in types if name in value]:
            require_shape(value[name], types[name], f"{key}.{name}")


def refusal(key: str, value: object, hint: Any) -> str:
    """The sentence for a value that a setting of type `hint` cannot have."""
    limit = limit_of(hint)
    if isinstance(limit, OneOf) and isinstance(value, str):
        return f"{key}={value}: {limit.hint(value)}"
    return f"{key}={format_value(value)}: give {describe_type(hint)}"


def describe_type(hint: Any) -> str:
    """Describe the values of a setting of type `hint`, such as: a whole number of at least 1, or null."""
    inner = without_none(hint)
    limit = limit_of(inner)
    if inner is not hint:
        return f"{describe_type(inner)}, or null"
    if isinstance(limit, Range):
        noun = "whole number" if get_args(inner)[0] is int else "number"
        return limit.describe(noun)
    if isinstance(limit, OneOf):
        return f"one of {', '.join(map(format_value, limit.words))}"
    if get_origin(inner) in (list, tuple):
        count = f" of {required_length(inner)}" if required_length(inner) else ""
        return f"a list{count}, each item {describe_type(get_args(inner)[0])}"
    if get_origin(inner) is dict:
        return f"a mapping, each value {describe_type(get_args(inner)[1])}"
    if is_dataclass(inner):
        return f"a mapping such as {{{fields(inner)[0].name}: …}}"
    return {bool: "true or false", str: "text"}.get(inner, "another value")


def type_at(hint: Any, key: str) -> Any:
    """The type of the setting that is called `key` inside one of type `hint`; None if that says nothing of it."""
    for step in re.findall(r"[^.\[\]]+", key):
        inner = without_none(hint)
        if is_dataclass(inner):
            hint = types_of(inner).get(step)
        elif get_origin(inner) in (dict, list, tuple):
            of_items, *of_values = get_args(inner)
            hint = of_values[0] if get_origin(inner) is dict else of_items
        else:
            return None
    return hint


def types_of(kind: Any) -> dict[str, Any]:
    """The annotated types of a dataclass's fields."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def without_none(hint: Any) -> Any:
    """The type of a setting where it is not null."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return next(member for member in get_args(hint) if member is not NoneType)


def limit_of(hint: Any) -> Any:
    """The Range or OneOf of a type, null aside; None if it has none."""
    inner = without_none(hint)
    if get_origin(inner) is not Annotated:
        return None
    return get_args(inner)[1]


def required_length(hint: Any) -> int | None:
    """How many items a list must have; None if any number will do."""
    items = get_args(hint)
    if get_origin(hint) is not tuple or items[-1] is ...:
        return None
    return len(items)


def format_value(value: object) -> str:
    """A value as YAML spells it, such as null or true; numbers to six digits."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
