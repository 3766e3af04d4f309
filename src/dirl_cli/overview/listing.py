"""The table of many runs: as many columns as a terminal is wide, all of them in a pipe; no number is ever cut."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap

from rich.text import Text

from dirl_cli.console import PlainConsole
from dirl_cli.overview.status import RunStatus
from dirl_cli.report.progress import format_clock
from dirl_cli.text import counted, percent, with_digits

STYLES = {
    "running": "green",
    "suspended": "yellow",
    "stopped": "yellow",
    "failed": "bold red",
    "unreadable": "bold red",
}
NAME = "run"
GAP = 2  # spaces between columns
LEAST_NAME = 18  # letters of a name that stand in one line, even in a narrow terminal
BESIDE_NAME = (
    "state",
    "step",
    "accuracy %",
    "left",
    "reward",
    "loss",
    "last",
    "command",
    "held out",
    "tok/fwd",
    "length",
)
LEFT = ("state", "command")
EVERYWHERE = 10_000  # columns, where nothing is to be fitted into any


def row_of(run: RunStatus, root: Path, now: float) -> dict[str, str]:
    """The cells of a run; empty where it has no such thing."""
    metrics = run.metrics
    is_learning = run.command in ("sft", "dpo")  # the loss of RL says nothing
    accuracy = metrics.get("accuracy") if run.command == "eval" else metrics.get("greedy_accuracy")
    if run.command == "dpo":
        accuracy = metrics.get("reward_accuracy", accuracy)
    return {
        NAME: name_in(run.directory, root),
        "command": run.command,
        "state": run.state,
        "step": f"{run.step}/{run.steps}" if run.steps else str(run.step or ""),
        "loss": with_digits(metrics.get("loss") if is_learning else None, 4),
        "held out": with_digits(metrics.get("validation_loss"), 4),
        "reward": with_digits(metrics.get("reward"), 3),
        "accuracy %": percent(accuracy),
        "length": with_digits(metrics.get("length"), 0),
        "tok/fwd": with_digits(metrics.get("tokens_per_forward"), 2),
        "left": "" if run.seconds_left is None else format_clock(run.seconds_left),
        "last": ago(now - run.changed) if run.changed else "",
    }


def name_in(directory: Path, root: Path) -> str:
    """A run's path below `root`; its own path where it is not below."""
    try:
        relative = directory.relative_to(root)
    except ValueError:
        return str(directory)
    return str(relative) if relative.parts else str(directory)


def ago(seconds: float) -> str:
    """How long something is past, in the largest unit of which there is one."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "now"


def show_runs(runs: Sequence[RunStatus], root: Path, console: PlainConsole) -> None:
    """Print a row a run, those that changed last at the end, where the eye is. root: what their names begin below."""
    ordered = sorted(runs, key=lambda run: (run.changed, str(run.directory)))
    now = time.time()
    rows = [row_of(run, root, now) for run in ordered]
    width = console.width if console.is_terminal else EVERYWHERE
    columns, name_width = fitting_columns(rows, width)
    print_table(rows, columns, name_width, console, style_of_state)

    hidden = [column for column in filled(rows) if column not in columns]
    for run in ordered:
        if run.remark and run.state != "running":
            console.print(f"{name_in(run.directory, root)}: {run.remark}", soft_wrap=True)
    states = Counter(run.state for run in ordered)
    told = ", ".join(f"{count} {state}" for state, count in states.most_common())
    console.print(f"{counted(len(runs), 'run')}: {told}", soft_wrap=True)
    if hidden:
        console.print(f"a wider terminal shows {', '.join(hidden)}", soft_wrap=True, style="dim")


def filled(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The columns in which any row has something."""
    return [column for column in rows[0] if any(row[column] for row in rows)] if rows else []


def fitting_columns(rows: Sequence[Mapping[str, str]], width: int) -> tuple[list[str], int]:
    """The columns that fit into `width`, the most telling ones, and the width of the names, which alone are broken."""
    columns = filled(rows)
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    # Names are broken only where a terminal is too narrow for them and the first two columns.
    least = sum(widths[column] + GAP for column in BESIDE_NAME[:2] if column in widths)
    name_width = min(widths[NAME], max(LEAST_NAME, width - least))

    chosen = {NAME}
    taken = name_width
    for column in BESIDE_NAME:
        if column in widths and taken + GAP + widths[column] <= width:
            chosen.add(column)
            taken += GAP + widths[column]
    return [column for column in columns if column in chosen], name_width


def style_of_state(row: Mapping[str, str], column: str) -> str:
    return STYLES.get(row[column], "") if column == "state" else ""


def print_table(
    rows: Sequence[Mapping[str, str]],
    columns: Sequence[str],
    name_width: int,
    console: PlainConsole,
    style: Callable[[Mapping[str, str], str], str] = lambda row, column: "",
) -> None:
    """Print some columns of rows under their names, the first of them broken where it is wider than `name_width`.

    By hand, since rich would cut its tables to the 80 columns that it takes a pipe to have.
    """
    name, *others = columns
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in others}
    head = dict(zip(columns, columns, strict=True))
    for row in (head, *rows):
        broken = wrap(row[name], name_width, break_on_hyphens=False) or [""]
        line = Text(f"{broken[0]:<{name_width}}", style="bold" if row is head else "")
        for column in others:
            side = "<" if column in LEFT else ">"
            line.append(" " * GAP)
            line.append(f"{row[column]:{side}{widths[column]}}", style=style(row, column))
        line.rstrip()
        console.print(line, soft_wrap=True)
        for part in broken[1:]:
            console.print(part, soft_wrap=True)
