"""The pages of the repository, and what stands in their blocks of code."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

from tests.helpers.paths import ROOT

PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
README = PAGES[0].read_text()
BASH = shutil.which("bash") or "bash"
# What bash is told before it runs a page's block. There are no programs, and one of them notes its words, each time in
# a file of its own, since several may run at once. Those of the others in which it stands are launchers, as `srun dirl
# rl`; but `lm_eval --model dirl --tasks …` is none.
STAND_INS = r"""
PROGRAM() { TIMES=$((TIMES + 1)); printf '%s\0' "$@" > "$NOTED/$BASHPID-$TIMES"; }
bash() { "$BASH" "$@"; }
exec() { "$@"; }
command_not_found_handle() {
    while [ $# != 0 ]; do
        case "$1 $2" in "PROGRAM "[a-z]* | "bash -c") "$@"; return ;; esac
        shift
    done
}
export -f PROGRAM bash exec command_not_found_handle
"""


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def code_blocks(language: str, text: str) -> list[str]:
    """The fenced blocks of a page in one language, without what indents them."""
    return [dedent(block) for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.S | re.M)]


@cache
def commands(text: str, program: str = "dirl") -> list[list[str]]:
    """The words of each `dirl` command in a page's blocks for the shell, or of another `program`, sorted.

    Bash itself finds them: behind a pipe, in `$(…)`, after variables or a launcher, and in the background.
    """
    blocks = code_blocks("bash", text)
    return sorted(words for block in blocks for words in commands_of_block(block, program))


def commands_of_block(block: str, program: str) -> list[list[str]]:
    with TemporaryDirectory() as directory:
        noted = Path(directory, "noted")
        noted.mkdir()
        run_block(STAND_INS.replace("PROGRAM", program) + block, noted)
        return [file.read_text().split("\0")[:-1] for file in noted.iterdir()]


def run_block(script: str, noted: Path) -> None:
    """Run a script in an empty directory, with no program to be found."""
    empty = noted.with_name("empty")
    empty.mkdir()
    env = {"PATH": str(empty), "NOTED": str(noted)}
    told = subprocess.run(
        [BASH, "-c", f"{script}\nwait"], env=env, cwd=empty, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert "syntax error" not in told.stderr, told.stderr


def files(text: str) -> dict[str, str]:
    """The files that a page tells to write: blocks after a line that names one and ends in a colon."""
    return dict(re.findall(r"`([\w/]+\.(?:py|yaml))`[^`\n]*:\n\n```\w+\n(.*?)```", text, re.S))
