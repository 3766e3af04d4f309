"""`dirl` in the process of a test."""

from pathlib import Path

from typer.testing import CliRunner

from dirl_cli.cli.app import app


def dirl(*words, full_error="0"):
    """Run the command line in this process."""
    return CliRunner().invoke(app, list(words), env={"HYDRA_FULL_ERROR": full_error})


def refusal(*words):
    """The one sentence with which a command line is refused."""
    result = dirl(*words)
    assert result.exit_code == 1
    assert result.stdout in ("", f"dirl {words[0]} → {Path('runs', words[0], 'tiny-arithmetic')}\n")  # what began
    (sentence,) = result.stderr.splitlines()
    return sentence
