"""A hook of the docs site: the pages that are made of the configuration and the code each time the site is built.

The configuration has a page for each command and each group, the Python interface one, of its docstrings.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import site_settings
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from site_settings import Setting

from dirl_cli.cli.app import app
from dirl_cli.cli.complete import format_completion
from dirl_cli.cli.group_help import summaries
from dirl_cli.cli.schema import SCHEMAS
from dirl_cli.files import conf_dir

FOLDER = "configuration"
GROUPS = [*site_settings.groups(), "experiment"]
INTRODUCTION = """# Configuration

Every key of every command, with its default, as the files in `conf/` have them: these pages are made from those. A word
`KEY=VALUE` sets a key, `GROUP=CHOICE` chooses a file; [the command line](../runs.md#the-command-line) tells the rest.

"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages into the navigation where it names the folder."""
    pages: list[Any] = [f"{FOLDER}/index.md"]
    pages.append({"Commands": [{name: f"{FOLDER}/{name}.md"} for name in SCHEMAS]})
    pages.append({"Groups": [{f"{name}=": f"{FOLDER}/groups/{name}.md"} for name in GROUPS]})
    for section in config.nav or []:
        for entries in section.values():
            for entry in entries:
                if isinstance(entry, dict) and entry.get("Configuration") == FOLDER:
                    entry["Configuration"] = pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages."""
    pages = {"index": index()}
    pages |= {command: command_page(command) for command in SCHEMAS}
    pages |= {f"groups/{group}": group_page(group) for group in GROUPS}
    for name, text in pages.items():
        files.append(File.generated(config, f"{FOLDER}/{name}.md", content=text))
    files.append(File.generated(config, "python.md", content=python()))
    return files


def python() -> str:
    """The names that `dirl_cli` exports, and the sampler that one of them returns, for mkdocstrings to fill in."""
    objects = [f"dirl_cli.api.{name}" for name in ("load_sampler", "score")]
    objects += [f"dirl_cli.types.{name}" for name in ("Decoding", "Trajectory", "Problem")]
    objects.append("dirl_cli.rollout.sampler.Sampler")
    text = (
        "# From Python\n\n`from dirl_cli import Decoding, Problem, Trajectory, load_sampler, score`: two functions, and"
    )
    text += " what they take and return. The [quick start](quickstart.md#from-python) uses them.\n\n"
    return text + "".join(f"::: {name}\n\n" for name in objects)


def index() -> str:
    commands = [[f"[`dirl {name}`]({name}.md)", summary(name)] for name in SCHEMAS]
    groups = [
        [f"[`{group}=`](groups/{group}.md)", ", ".join(f"`{name}`" for name in files_of(group))] for group in GROUPS
    ]
    return INTRODUCTION + table(["command", ""], commands) + table(["group", "choices"], groups)


def command_page(command: str) -> str:
    page = f"# dirl {command}\n\n{summary(command)} [How to use it](../{command}.md)\n\n"

    chosen = site_settings.chosen_groups(command)
    if chosen:
        rows = []
        for group, choice in sorted(chosen.items()):
            rows.append([f"[`{group}=`](groups/{group}.md)", code(choice) if choice else ""])
        page += "## Groups\n\n" + table(["group", "choice by default"], rows)
    settings = site_settings.command_settings(command)
    page += "## Keys\n\n" + table(["key", "default", "may be", ""], [row(setting) for setting in settings])

    own = site_settings.set_of_groups(command)
    if own:
        page += "## Keys of groups\n\nWhatever is chosen of a group, this command sets\n\n"
        page += table(["key", "to"], [[code(key), default_of(value)] for key, value in own.items()])
    return page


def group_page(group: str) -> str:
    page = f"# {group}\n\n"
    rows = [[code(f"{group}={choice}"), words(line)] for choice, line in summaries(group, None).items()]
    page += table(["choice", ""], rows)

    # A table for the choices of each class, since these have the same keys.
    settings = site_settings.group_settings(group) if group != "experiment" else {}
    for choices in alike(group, settings):
        rows = merged_rows(group, {choice: settings[choice] for choice in choices})
        if rows:
            title = "Keys" if len(choices) == len(settings) else f"Keys of {', '.join(choices)}"
            page += f"## {title}\n\n" + table(["key", "default", "may be", ""], rows)

    page += "## Files\n\n"
    for choice, text in files_of(group).items():
        lines = "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())
        page += f'??? note "conf/{group}/{choice}.yaml"\n\n    ````yaml\n{lines}    ````\n\n'
    return page


def alike(group: str, settings: Mapping[str, Sequence[Setting]]) -> list[list[str]]:
    """The choices of a group, those of a class together."""
    by_class: dict[str, list[str]] = {}
    for choice in settings:
        by_class.setdefault(site_settings.target_of(group, choice), []).append(choice)
    return list(by_class.values())


def merged_rows(group: str, settings: Mapping[str, Sequence[Setting]]) -> list[list[str]]:
    """A row for each key of some choices; where these differ, the commonest content first."""
    by_key: dict[str, dict[str, Setting]] = {}
    for choice, own in settings.items():
        for setting in own:
            by_key.setdefault(setting.key, {})[choice] = setting

    rows = []
    for key, of_choices in by_key.items():
        columns = zip(*(row(setting)[1:] for setting in of_choices.values()), strict=True)
        cells = [told_apart(dict(zip(of_choices, column, strict=True))) for column in columns]
        rows.append([code(f"{group}.{key}"), *cells])
    return rows


def told_apart(cells: Mapping[str, str]) -> str:
    """What most choices have, then what others have, with their names. cells: by choice."""
    choices_of: dict[str, list[str]] = {}
    for choice, cell in cells.items():
        choices_of.setdefault(cell, []).append(choice)
    if len(choices_of) == 1:
        return next(iter(choices_of))
    parts = []
    for cell, choices in sorted(choices_of.items(), key=lambda item: -len(item[1])):
        is_usual = not parts and len(choices) > 1
        parts.append(cell if is_usual else f"{', '.join(choices)}: {cell}")
    return "<br>".join(parts)


def row(setting: Setting) -> list[str]:
    return [code(setting.key), default_of(setting.default), words(setting.values), words(setting.line)]


def default_of(value: Any) -> str:
    if value == "???":
        return "to be given"
    return code(format_completion(value) or str(value))


def summary(command: str) -> str:
    """What the help of a command says first."""
    [line] = [each.help for each in app.registered_commands if (each.name or each.callback.__name__) == command]
    return str(line)


def files_of(group: str) -> dict[str, str]:
    return {file.stem: file.read_text() for file in sorted((conf_dir() / group).glob("*.yaml"))}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def code(text: str) -> str:
    return f"<code>{escaped(text)}</code>"


def words(text: str) -> str:
    """A text as a cell of a table, what stands between backticks as code."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(code(part) if i % 2 else escaped(part) for i, part in enumerate(parts))


def escaped(text: str) -> str:
    """A text on one line in which nothing is Markdown."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[|*_{}\[\]\\`$~]", lambda match: f"&#{ord(match[0])};", text)
