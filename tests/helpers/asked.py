"""Problems of which nothing matters but the reference answer."""

from dirl_cli.types import Problem


def asked(gold: str) -> Problem:
    return Problem("", "", gold)
