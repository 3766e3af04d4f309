"""Errors that a user can fix."""

from collections.abc import Iterable
from difflib import get_close_matches


class DirlError(Exception):
    """One sentence that names the problem and its remedy; shown without a traceback, exit code 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint to append to an error: the nearest known name, or all of them."""
    known = list(known)
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
