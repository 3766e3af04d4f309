"""One run in a screen: how far it came, its figures, what it took, where its parts lie and how it goes on."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.text import Text

from dirl_cli.console import PlainConsole
from dirl_cli.line_files import step_files
from dirl_cli.overview.curves import course_cells, course_of, format_metric, is_leading, names_of, phase_seconds
from dirl_cli.overview.files import (
    Numbers,
    checkpoint_steps,
    read_history,
    read_mapping,
    read_settings,
)
from dirl_cli.overview.listing import EVERYWHERE, GAP, STYLES, print_table
from dirl_cli.overview.status import RunStatus, status_of
from dirl_cli.report.progress import format_clock, format_shares
from dirl_cli.text import counted, redact, shell_word

MARGIN = 13  # letters before what a line says
PARTS = {  # of a run directory, besides its model, checkpoints and rollouts
    "adapter": "LoRA adapter",
    "answers.jsonl": "answers",
    "eval_card.json": "card",
    "loss.png": "curves",
    "rl.png": "curves",
    "dpo.png": "curves",
}


@dataclass(frozen=True)
class RunFiles:
    """All that a run left to read: its status, configuration, environment and metrics."""

    status: RunStatus
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    history: Sequence[Numbers]


def read_run(run: Path) -> RunFiles:
    environment = read_mapping(run / "environment.json")
    return RunFiles(status_of(run), read_settings(run), environment, read_history(run))


def said_words(environment: Mapping[str, Any]) -> list[str]:
    """The words of `dirl COMMAND WORDS…` that started a run last; none where something else did."""
    try:
        words = shlex.split(str(environment.get("command", "")))
    except ValueError:  # a quote that does not end
        return []
    for i, word in enumerate(words):
        if Path(word).name == "dirl":
            return words[i + 1 :]
    return []


def show_summary(run: RunFiles, departures: Sequence[str], console: PlainConsole) -> None:
    """Print all of it. departures: the settings that are no defaults."""
    status = run.status
    head = Text(f"{status.directory}: ", style="bold")
    head.append(status.state, style=STYLES.get(status.state, ""))
    console.print(head.append(f", {progress_text(status)}"), soft_wrap=True)
    if status.remark:
        say(console, "", status.remark)
    for name, text in run_facts(run, departures):
        say(console, name, text)
    show_metrics(run, console)
    for name, command in following_commands(run):  # in one line, so that they can be copied
        console.print(f"{name:<{MARGIN}}{command}", soft_wrap=True)


def say(console: PlainConsole, name: str, text: str) -> None:
    """Print a line under a name; a terminal breaks what is too long for it between words."""
    width = max(20, console.width - MARGIN) if console.is_terminal else EVERYWHERE
    lines = Text(text).wrap(console, width)
    for i, line in enumerate(lines or [Text("")]):
        line.rstrip()
        console.print(f"{name if i == 0 else '':<{MARGIN}}{line.plain}".rstrip(), soft_wrap=True)


def progress_text(status: RunStatus) -> str:
    if status.command == "eval":
        of_all = f" of {status.steps:,}" if status.steps else ""
        return f"dirl eval, {counted(status.step, 'answer')}{of_all}"
    if not status.command:
        return "of no command that is known"
    left = f", {format_clock(status.seconds_left)} left" if status.seconds_left is not None else ""
    return f"dirl {status.command}, step {status.step} of {status.steps}{left}"


def run_facts(run: RunFiles, departures: Sequence[str]) -> list[tuple[str, str]]:
    """What is said of a run before its figures, by name."""
    lines = []
    if departures:
        lines.append(("settings", " ".join(shlex.quote(redact(word)) for word in departures)))
    lines += time_facts(run.history)
    if versions := versions_text(run.environment):
        lines.append(("versions", versions))

    # Where its parts lie.
    directory = run.status.directory
    if (directory / "model").is_dir():
        lines.append(("model", str(directory / "model")))
    if steps := checkpoint_steps(directory):
        best = best_checkpoint(directory, run.settings, steps)
        names = ", ".join(f"{step} (best)" if step == best else str(step) for step in steps[-6:])
        lines.append(("checkpoints", f"{directory / 'checkpoints'}: {'… ' if len(steps) > 6 else ''}{names}"))
    if rollouts := step_files(directory / "rollouts"):
        lines.append(("rollouts", f"{directory / 'rollouts'}: {counted(len(rollouts), 'step')}"))
    for name, what in PARTS.items():
        if (directory / name).exists():
            lines.append((what, str(directory / name)))
    return lines


def time_facts(history: Sequence[Numbers]) -> list[tuple[str, str]]:
    times = [line["time"] for line in history if "time" in line]
    lines = []
    if times:
        first, last = (datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M") for time in (times[0], times[-1]))
        lines.append(("steps from", f"{first} to {last}"))
    phases = phase_seconds(history)
    if phases:
        lines.append(("time", f"{format_clock(sum(phases.values()))}: {format_shares(phases)}"))
    return lines


def versions_text(environment: Mapping[str, Any]) -> str:
    """Such as: dirl 0.1.0 (commit a5bb2693, changed), torch 2.13.0, Python 3.11.7."""
    packages = environment.get("packages")
    versions = {"dirl": None, **packages} if isinstance(packages, dict) else {}
    git = environment.get("git")
    if isinstance(git, dict):
        versions["dirl"] = f"{versions.get('dirl') or ''} (commit {str(git.get('commit'))[:8]}"
        versions["dirl"] += ", changed)" if git.get("dirty") else ")"
    named = [f"{name} {version}" for name, version in versions.items() if version]
    if "python" in environment:
        named.append(f"Python {environment['python']}")
    return ", ".join(named)


def best_checkpoint(directory: Path, settings: Mapping[str, Any], steps: Sequence[int]) -> int | None:
    """The step of the checkpoint that `keep_best` keeps, if the run has one."""
    name = settings.get("keep_best")
    if not isinstance(name, str):
        return None
    values = {}
    for step in steps:
        measured = read_mapping(directory / "checkpoints" / f"step-{step:06d}" / "state.json").get("measured")
        if isinstance(measured, dict) and isinstance(measured.get(name), int | float):
            values[step] = -measured[name] if "loss" in name else measured[name]
    return max(values, key=lambda step: values[step]) if values else None


def show_metrics(run: RunFiles, console: PlainConsole) -> None:
    """Print the leading metrics with their first, last and best value; of an evaluation what its card says."""
    rows: list[Mapping[str, str]] = []
    if run.status.command == "eval":
        for name, value in run.status.metrics.items():
            rows.append({"metric": name, "value": format_metric(name, value)})
    else:
        courses = [course_of(run.history, name) for name in names_of(run.history)]
        rows = [course_cells(course) for course in courses if is_leading(course.name, run.status.command)]
    if not rows:
        return
    console.print()
    width = console.width if console.is_terminal else EVERYWHERE
    columns = list(rows[0])
    needed = sum(max(len(column), *(len(row[column]) for row in rows)) + GAP for column in columns[1:])
    longest = max(len(row[columns[0]]) for row in rows)
    print_table(rows, columns, max(10, min(longest, width - needed)), console)
    console.print()


def following_commands(run: RunFiles) -> list[tuple[str, str]]:
    """How a run goes on, or what can be done with what it left."""
    status = run.status
    lines = []
    words = said_words(run.environment)
    if status.state in ("stopped", "failed") and words:
        lines.append(("go on with", shlex.join(["dirl", *words])))
    elif status.state in ("stopped", "failed"):
        lines.append(("go on with", "the command that began it"))
    if status.state == "finished" and status.command != "eval":
        lines.append(("evaluate it", f"dirl eval {shell_word('model', status.directory)}"))
    return lines
