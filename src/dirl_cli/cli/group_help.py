"""What the choices of a config group are, a line each, from the first comment of their files: `dirl rl algo=help`."""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from dirl_cli.cli import config_tree
from dirl_cli.console import PlainConsole
from dirl_cli.files import conf_dir

HELP = "help"


def show_asked_groups(words: Sequence[str], directory: Path | None) -> bool:
    """Show the choices of each group that a word such as `algo=help` asks for; returns whether any did.

    directory: the user's config tree, if any.
    """
    groups = [word.removesuffix(f"={HELP}") for word in words if word.endswith(f"={HELP}")]
    listed = [group for group in groups if config_tree.choices(group) and HELP not in config_tree.choices(group)]
    for group in listed:
        show_choices(group, directory)
    return bool(listed)


def show_choices(group: str, directory: Path | None, stderr: bool = False) -> None:
    """Show what each choice of a group is."""
    PlainConsole(stderr=stderr).print(table_of(group, directory))


def table_of(group: str, directory: Path | None) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, summary in summaries(group, directory).items():
        table.add_row(f"{group}={name}", summary)
    return table


def summaries(group: str, directory: Path | None) -> dict[str, str]:
    """By the name of each choice, what its file says first; "" where that is nothing."""
    trees = [tree for tree in (directory, conf_dir()) if tree]
    summary_of = {}
    for name in config_tree.choices(group):
        files = [tree / group / f"{name}.yaml" for tree in trees]
        summary_of[name] = next((first_sentence(file.read_text()) for file in files if file.exists()), "")
    return summary_of


def first_sentence(text: str) -> str:
    """The first sentence of the comment that a config begins with; else of the first in it, else its path."""
    lines = [line for line in text.splitlines() if not line.startswith("# @package")]
    opening = []
    for line in lines:
        if not line.startswith("# ") or line.startswith("#  "):  # a formula is indented
            break
        opening.append(line.removeprefix("# ").strip())
    comment = " ".join(opening)
    if not opening:
        comment = next((line.partition(" # ")[2].strip() for line in lines if " # " in line), "")
    if not comment:  # of a published model, whose path says it all
        comment = next((line.partition("path: ")[2] for line in lines if line.startswith("path: ")), "")
    return re.split(r"(?<!Dr)\. (?=[A-Z])", comment)[0].rstrip(".")
