"""Runs side by side: what sets them apart, where they ended, and their curves in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dirl_cli.console import PlainConsole
from dirl_cli.errors import DirlError
from dirl_cli.overview.curves import SHARES, course_of, format_metric, is_leading, names_of, phase_seconds, rank_of
from dirl_cli.overview.files import Numbers, command_of
from dirl_cli.overview.listing import EVERYWHERE, GAP, print_table
from dirl_cli.overview.summary import RunFiles
from dirl_cli.ranges import format_value
from dirl_cli.report.plot import Panel, plot
from dirl_cli.report.progress import format_clock

NAME = ""  # of the column with what is compared
APART = {"name", "out", "resume", "prepare", "dry_run", "plan"}  # settings that differ in any two runs or say nothing
COMPUTED = {"model.name"}  # from its path
MOST_SETTINGS = 20  # differing settings that are told
LONGEST = 30  # letters of a setting's value: of a longer one, such as a path, the end is shown
TARGET = "._target_"
PICTURES = (".png", ".svg", ".pdf")
MOST_PANELS = 9
CAPTION = "of each metric the last value, in brackets the best where that is another"


def labels_of(directories: Sequence[Path]) -> list[str]:
    """Short names of runs: of their paths the parts that not all have. Raises DirlError where one is named twice."""
    if len({path.resolve() for path in directories}) < len(directories):
        raise DirlError("a run is named twice: give different ones to compare")
    parts = [path.parts for path in directories]
    shared = 0
    while shared < min(map(len, parts)) and len({path[shared] for path in parts}) == 1:
        shared += 1
    return ["/".join(path[shared:]) or str(directory) for path, directory in zip(parts, directories, strict=True)]


def show_side_by_side(runs: Sequence[RunFiles], console: PlainConsole) -> None:
    """Print a column a run; where a terminal is too narrow for all of them, some below the others."""
    labels = labels_of([run.status.directory for run in runs])
    rows = comparison_rows(runs, labels)
    width = console.width if console.is_terminal else EVERYWHERE
    name_width = min(max(len(row[NAME]) for row in rows), max(16, width // 3))

    widths = {label: max(len(label), *(len(row[label]) for row in rows)) + GAP for label in labels}
    for i, block in enumerate(blocks_of(labels, widths, width - name_width)):
        if i:
            console.print()
        print_table(rows, [NAME, *block], name_width, console)
    console.print(f"\n{CAPTION}", soft_wrap=True, style="dim")


def blocks_of(labels: Sequence[str], widths: Mapping[str, int], room: int) -> list[list[str]]:
    """The labels in as few blocks as have room beside the names, each with one of them at least."""
    blocks: list[list[str]] = [[]]
    for label in labels:
        taken = sum(widths[name] for name in blocks[-1])
        if blocks[-1] and taken + widths[label] > room:
            blocks.append([])
        blocks[-1].append(label)
    return blocks


def comparison_rows(runs: Sequence[RunFiles], labels: Sequence[str]) -> list[dict[str, str]]:
    """What is compared, a row each with a cell for each run: state, metrics, time, then the settings that differ."""
    rows = [
        cells("command", [run.status.command for run in runs], labels),
        cells("state", [run.status.state for run in runs], labels),
        cells("step", [f"{run.status.step}/{run.status.steps}" for run in runs], labels),
    ]
    measured = [figures_of(run) for run in runs]
    names = sorted(set().union(*measured), key=lambda name: (rank_of(name), name))
    rows += [cells(name, [figures.get(name, "") for figures in measured], labels) for name in names]
    seconds = [sum(phase_seconds(run.history).values()) for run in runs]
    if any(seconds):
        rows.append(cells("time", [format_clock(value) if value else "" for value in seconds], labels))

    rows += [cells(key, values, labels) for key, values in settings_apart([run.settings for run in runs])]
    return rows


def cells(name: str, values: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    return {NAME: name, **dict(zip(labels, values, strict=True))}


def settings_apart(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, with the value of each run; "" where one lacks it.

    What follows from a difference is left out: the keys of another class or of another command.
    """
    flat = [dict(dotted(mapping)) for mapping in settings]
    is_one_command = len({command_of(mapping) for mapping in settings}) == 1
    keys: dict[str, None] = {}  # a set that keeps its order
    for mapping in flat:
        keys |= dict.fromkeys(mapping)
    differing = []
    for key in keys:
        values = [mapping.get(key, "") for mapping in flat]
        if len(set(values)) == 1 or key.partition(".")[0] in APART or key in COMPUTED:
            continue
        classes = {mapping.get(key.rpartition(".")[0] + TARGET) for mapping in flat}
        if all(key in mapping for mapping in flat) or (is_one_command and len(classes) == 1):
            differing.append((key.removesuffix(TARGET), [shortened_value(key, value) for value in values]))
    if len(differing) > MOST_SETTINGS:
        more = [""] * len(settings)
        differing = [*differing[:MOST_SETTINGS], (f"and {len(differing) - MOST_SETTINGS} more settings", more)]
    return differing


def shortened_value(key: str, value: str) -> str:
    """A class by its name alone, the end of what is long."""
    if key.endswith(TARGET):
        return value.rpartition(".")[2]
    return value if len(value) <= LONGEST else f"…{value[1 - LONGEST :]}"


def dotted(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The dotted keys of a nested mapping, and their values as text."""
    pairs = []
    for key, value in node.items():
        if isinstance(value, dict) and value:
            pairs += dotted(value, f"{prefix}{key}.")
        else:
            number = float(value) if isinstance(value, int) and not isinstance(value, bool) else value  # 0 is 0.0
            pairs.append((f"{prefix}{key}", format_value(number)))
    return pairs


def figures_of(run: RunFiles) -> dict[str, str]:
    """The leading metrics of a run as text, of an evaluation all that its card has."""
    if run.status.command == "eval":
        return {name: format_metric(name, value) for name, value in run.status.metrics.items()}
    figures = {}
    for name in names_of(run.history):
        if is_leading(name, run.status.command):
            course = course_of(run.history, name)
            text = format_metric(name, course.last)
            best = format_metric(name, course.best[0]) if course.best else text
            if best != text:
                text += f" ({best})"
            figures[name] = text
    return figures


def draw_comparison(runs: Sequence[RunFiles], file: Path) -> None:
    """Draw the leading metrics of runs, a panel each, with a curve for each run.

    Raises DirlError where the file is no picture or cannot be written, or where there is nothing to draw.
    """
    if file.suffix not in PICTURES:
        raise DirlError(f"{file} is no picture: give a name that ends in {' or '.join(PICTURES)}")
    labels = labels_of([run.status.directory for run in runs])
    merged: list[Numbers] = []
    names: dict[str, dict[str, str]] = {}
    for i, run in enumerate(runs):
        leading = [name for name in names_of(run.history) if is_leading(name, run.status.command)]
        for name in leading:
            names.setdefault(name, {})[f"{i}/{name}"] = labels[i]
        for line in run.history:
            merged.append({"step": line["step"], **{f"{i}/{name}": line[name] for name in leading if name in line}})
    if not names:
        raise DirlError("none of these runs has metrics by step: leave --plot out")

    ordered = sorted(names, key=rank_of)[:MOST_PANELS]
    panels = [Panel(name, names[name], percent=SHARES.search(name) is not None) for name in ordered]
    history = sorted(merged, key=lambda line: line["step"])
    plot(history, panels, " · ".join(labels), file, "give another file with --plot")
