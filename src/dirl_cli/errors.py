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
    """A model or data set of the Hub is not, or not completely, on this machine."""


class UnknownChoice(DirlError):  # noqa: N818
    """A config group has no such choice. group: its name."""

    def __init__(self, sentence: str, group: str) -> None:
        super().__init__(sentence)
        self.group = group


class DoesNotFit(DirlError):  # noqa: N818
    """A run needs clearly more memory than the machine has."""

    exit_code = 3


class Stopped(DirlError):  # noqa: N818  # it is no error
    """The run stopped on a signal, and the same command goes on.

    exit_code: as `stop_code` gives it.
    """

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class Interrupted(KeyboardInterrupt):
    """A signal asks to stop what is under way. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def stop_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code of a command that stopped without a loss: 0 after SIGTERM, 130 after Ctrl-C.

    A scheduler that sent SIGTERM learns by it that nothing is lost, a shell that Ctrl-C ended the command.
    """
    number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
    return STOP_CODES[signal.Signals(number)]


def death(code: int, remedy: str) -> str:
    """What to say of a process that a signal ended. code: its exit code. remedy: where memory ran out."""
    name = signal.Signals(-code).name
    return f"was killed by {name}; if nobody did, the machine may have run out of memory: {remedy}"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint to append to an error: the valid name that is most like this one, or all of them."""
    names = list(valid)
    matches = get_close_matches(name, names, n=1)
    if matches:
        return f"did you mean {matches[0]}?"
    return f"choose one of {', '.join(names)}"


def pip_install(extra: str) -> str:
    """The command that installs an extra of ours. It names the packages: `dirl` is on no index."""
    from importlib.metadata import requires  # not at the top: help does without

    packages = []
    for line in requires("dirl") or ():
        match = re.fullmatch(r"([^;]+); extra == '(.+)'", line.replace('"', "'"))
        if match and match[2] == extra:
            packages.append(shlex.quote(match[1].strip()))
    return f"pip install {' '.join(packages)}"
