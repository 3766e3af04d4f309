"""Errors that a user can fix."""

from collections.abc import Iterable
from difflib import get_close_matches

from dirl_cli.plain import masked, printable


class DirlError(Exception):
    """One sentence that names the problem and its remedy, without secrets; shown without a traceback."""

    exit_code = 1

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(masked(sentence)))


class Stopped(DirlError):  # noqa: N818  # it is no error
    """The run ended because it was asked to, and the same command goes on."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint to append to an error: the nearest known name, or all of them."""
    known = list(known)
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
