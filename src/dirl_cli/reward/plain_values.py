"""Values on their way between two processes that do not trust each other: plain data as JSON, nothing that acts.

What arrives is made of None, truth values, numbers, texts, bytes, ranges, lists, deques, tuples, sets and dictionaries,
each of exactly these types: it can hold no `__eq__` of the sender's.
"""

import json
import os
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

LONGEST_MESSAGE = 16 * 2**20  # bytes

Ask = Callable[[Any], Any]
"""From a request to the other process to its reply, both JSON."""


class Remote:
    """A value of the other process that is not plain: only that process can do something with it.

    It is equal to itself alone. handle: by which the other process knows it. ask: puts a request to it.
    """

    def __init__(self, handle: int, ask: Ask) -> None:
        vars(self).update(_handle=handle, _ask=ask)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._do("call", encode(list(args)), {name: encode(value) for name, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        return self._do("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("set", name, encode(value))

    def __iter__(self) -> Any:
        return iter(self._do("list"))

    def _do(self, action: str, *operands: Any) -> Any:
        return received(self._ask([action, self._handle, *operands]), self._ask)


def received(reply: Any, ask: Ask) -> Any:
    """The value of a reply; raises what it says was raised, or something that is no error of Python's own."""
    if "value" in reply:
        return decode(reply["value"], lambda handle: Remote(handle, ask))
    kinds = [BUILT_IN_ERRORS[name] for name in reply["errors"] if name in BUILT_IN_ERRORS]
    raise (kinds or [RuntimeError])[0](reply["text"])


def built_in_names(error: BaseException) -> list[str]:
    """What an error is called among Python's own, from its class upwards: ["ValueError", …] for a JSONDecodeError."""
    return [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]


def errors_below(kind: type[Exception]) -> dict[str, type[Exception]]:
    """The built-in errors that take one text, by name; none that ends a loop, by which `all(map(f, xs))` would pass."""
    errors = {kind.__name__: kind}
    for child in kind.__subclasses__():
        if child.__module__ == "builtins" and not issubclass(child, UnicodeError | StopIteration | StopAsyncIteration):
            errors |= errors_below(child)
    return errors


BUILT_IN_ERRORS = errors_below(Exception)


def encode(value: Any, keep: Callable[[Any], int] | None = None) -> Any:
    """A value as JSON; what is neither plain nor a `Remote` is kept, and its handle sent.

    keep: gives such a value a handle. Raises TypeError where there is none.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(item, keep) for item in value]
    for kind, name in ((tuple, "tuple"), (set, "set"), (frozenset, "frozenset"), (deque, "deque")):
        if isinstance(value, kind):
            return {name: [encode(item, keep) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Decimal):
        return {"Decimal": str(value)}
    if isinstance(value, Fraction):
        return {"Fraction": [value.numerator, value.denominator]}
    if isinstance(value, Remote):
        return {"handle": vars(value)["_handle"]}
    if keep is None:
        raise TypeError(f"{type(value).__name__} cannot be given to an answer")
    return {"handle": keep(value)}


def decode(message: Any, at: Callable[[int], Any]) -> Any:
    """The value that `encode` made a message of. at: the value behind a handle. Raises ValueError for another."""
    if isinstance(message, list):
        return [decode(item, at) for item in message]
    if not isinstance(message, dict):
        return message
    ((name, content),) = message.items()
    match name:
        case "tuple":
            return tuple(decode(item, at) for item in content)
        case "set":
            return {decode(item, at) for item in content}
        case "frozenset":
            return frozenset(decode(item, at) for item in content)
        case "dict":
            return {decode(key, at): decode(item, at) for key, item in content}
        case "bytes":
            return bytes.fromhex(content)
        case "bytearray":
            return bytearray.fromhex(content)
        case "complex":
            return complex(*content)
        case "deque":
            return deque(decode(item, at) for item in content)
        case "range":
            return range(*content)
        case "Decimal":
            return Decimal(content)
        case "Fraction":
            return Fraction(*content)
        case "handle":
            return at(content)
    raise ValueError(f"no value is written as {name}")


def send_message(descriptor: int, message: Any) -> None:
    """Write a message of JSON, after its length."""
    text = json.dumps(message).encode()
    data = len(text).to_bytes(8, "big") + text
    while data:
        data = data[os.write(descriptor, data) :]


def read_message(descriptor: int, longest: int = LONGEST_MESSAGE) -> Any:
    """Wait for a message of JSON. Raises EOFError where none comes any more, and ValueError where it is too long."""
    length = int.from_bytes(read_exactly(descriptor, 8), "big")
    if length > longest:
        raise ValueError("the message is too long")
    return json.loads(read_exactly(descriptor, length))


def read_exactly(descriptor: int, count: int) -> bytes:
    chunks = []
    while count:
        chunk = os.read(descriptor, min(count, 2**20))
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)
