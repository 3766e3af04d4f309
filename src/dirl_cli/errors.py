"""Errors that a user can fix."""

import re
import shlex
import signal
from collections.abc import Iterable
from difflib import get_close_matches

from dirl_cli.text import escape_controls, redact

STOP_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


class DirlError(Exception):
    """One sentence that names the problem and its remedy, without secrets; shown without a traceback."""

    exit_code = 1

    def __init__(self, sentence: str) -> None:
        super().__init__(escape_controls(redact(sentence)))


class NotDownloaded(DirlError):  # noqa: N818
    """Something of the Hub that was not downloaded."""


class DoesNotFit(DirlError):  # noqa: N818
    """A run wants clearly more memory than there is."""

    exit_code = 3


class Stopped(DirlError):  # noqa: N818  # it is no error
    """The run ended because it was asked to, and the same command goes on."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop what is under way."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def stop_code(asked: KeyboardInterrupt) -> int:
    """The exit code of a command that stopped without a loss.

    A scheduler that sent SIGTERM is told that nothing is lost, a shell that Ctrl-C ended the command.
    """
    return STOP_CODES[signal.Signals(asked.number if isinstance(asked, Interrupted) else signal.SIGINT)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint to append to an error: the nearest known name, or all of them."""
    known = list(known)
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"


def pip_install(extra: str) -> str:
    """The command that installs what one of our extras asks for. It names the packages: `dirl` is on no index."""
    from importlib.metadata import requires  # which help does without

    wanted = [re.fullmatch(r"([^;]+); extra == '(.+)'", line.replace('"', "'")) for line in requires("dirl") or ()]
    packages = [found[1].strip() for found in wanted if found and found[2] == extra]
    return f"pip install {' '.join(shlex.quote(package) for package in packages)}"
