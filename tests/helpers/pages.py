"""The pages of the repository, and what stands in their blocks of code."""

import re
import shlex
from textwrap import dedent

from tests.helpers.paths import ROOT

PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
README = PAGES[0].read_text()


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def code_blocks(language: str, text: str) -> list[str]:
    """The fenced blocks of a page in one language, without what indents them."""
    return [dedent(block) for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.S | re.M)]


def commands(text: str) -> list[list[str]]:
    """The words of each `dirl` command in a page's blocks for the shell."""
    lines = "".join(code_blocks("bash", text)).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dirl ")]


def files(text: str) -> dict[str, str]:
    """The files that a page tells to write: blocks after a line that names one and ends in a colon."""
    return dict(re.findall(r"`([\w/]+\.(?:py|yaml))`[^`\n]*:\n\n```\w+\n(.*?)```", text, re.S))
