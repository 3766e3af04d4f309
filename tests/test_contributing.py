"""The changes that CONTRIBUTING works out, made to a copy of the checkout: their tests pass, and their commands run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dirl_cli.models.tiny import Tiny
from tests.helpers.pages import code_blocks
from tests.helpers.paths import ROOT
from tests.helpers.small import paid_by_the_letter

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
COMMAND_LINE = "from dirl_cli.cli.app import app; app()"
TITLES = ("an RL objective", "a decoding strategy")
SMALL = ["~experiment", "device=cpu", "decoding.max_new_tokens=8"]
RL = ["data=arithmetic", "steps=1", "rl.problems=1", "rl.filter=reward", "eval_problems=0"]


def section(title: str) -> str:
    return PAGE.split(f"## Worked out: {title}\n")[1].split("\n## ")[0]


def changed(text: str, hunk: str) -> str:
    """A file's text after one hunk of a diff without line numbers, which must fit in one place."""
    lines = hunk.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] != "+")
    after = "".join(line[1:] for line in lines if line[0] != "-")
    if not text:
        return after
    assert text.count(before) == 1, f"this is not there once:\n{before}"
    return text.replace(before, after)


@pytest.fixture(params=TITLES)
def title(request):
    return request.param


@pytest.fixture
def checkout(title, tmp_path):
    """A copy of the checkout with the change made."""
    for directory in ("src", "conf", "tests", "docs"):
        shutil.copytree(ROOT / directory, tmp_path / directory, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [ROOT / "pyproject.toml", *ROOT.glob("*.md")]:
        shutil.copy(file, tmp_path)

    for diff in code_blocks("diff", section(title)):
        for change in re.split(r"^--- ", diff, flags=re.M)[1:]:
            name, _, hunks = change.partition("\n")
            file = tmp_path / name
            text = file.read_text() if file.exists() else ""
            for hunk in re.split(r"^@@\n", hunks, flags=re.M):
                text = changed(text, hunk)
            file.write_text(text)
    return tmp_path


def run(checkout: Path, *words: str) -> None:
    """Python with these words, in the changed checkout."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}/src", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_worked_out_change_fits_and_is_as_the_linter_wants_it(title, checkout):
    names = re.findall(r"^--- (\S+\.py)$", section(title), re.M)
    run(checkout, "-m", "ruff", "check", *names)
    run(checkout, "-m", "ruff", "format", "--check", *names)


@pytest.mark.slow
def test_a_worked_out_change_passes_its_tests_and_runs(title, checkout):
    Tiny(hidden_size=32, num_hidden_layers=1, intermediate_size=32).load("float32", "cpu").save(checkout / "model")
    short = {"rl": [*RL, paid_by_the_letter(checkout)], "eval": ["bench=arithmetic", "limit=1"]}
    [commands] = code_blocks("bash", section(title))
    for program, *words in map(shlex.split, commands.splitlines()):
        if program == "pytest":
            run(checkout, "-m", "pytest", *words)
        else:
            run(checkout, "-c", COMMAND_LINE, *words, "model=model", *SMALL, *short[words[0]])
