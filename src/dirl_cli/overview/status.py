"""How far a run has come, and whether it goes on: from its lock, its records and what else it left."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from dirl_cli.overview.files import (
    Numbers,
    checkpoint_steps,
    command_of,
    last_measured,
    numbers_of,
    only_numbers,
    read_mapping,
    read_settings,
    text_of,
)
from dirl_cli.overview.locks import Holder, lock_holder

RunState = Literal["running", "suspended", "finished", "stopped", "failed", "unreadable"]
SHOWN = (  # the metrics that tell most
    "loss",
    "validation_loss",
    "reward",
    "reward_accuracy",
    "accuracy",
    "greedy_accuracy",
    "length",
    "tokens_per_forward",
)
PACE = 50  # last steps that tell how long one takes


@dataclass(frozen=True)
class RunStatus:
    """A run at a glance.

    command: sft, rl, dpo or eval. step, steps: those done and all; of an evaluation answers, where 0 of them in all
    means that it is not known yet. metrics: the last value of each. seconds_left: None where nothing tells.
    changed: when it last wrote something, in seconds since 1970. remark: what its state alone does not say.
    """

    directory: Path
    command: str
    state: RunState
    step: int
    steps: int
    metrics: Numbers = field(default_factory=dict)
    seconds_left: float | None = None
    changed: float = 0.0
    remark: str = ""


def status_of(run: Path) -> RunStatus:
    """The status of a run that may be written right now."""
    holder = lock_holder(run / "lock")
    changed = last_change(run)
    settings = read_settings(run)
    if not settings:
        return RunStatus(run, "", "unreadable", 0, 0, changed=changed, remark="its config.yaml cannot be read")
    if command_of(settings) == "eval":
        return evaluation_status(run, settings, holder, changed)
    return training_status(run, settings, holder, changed)


def training_status(run: Path, settings: dict[str, Any], holder: Holder | None, changed: float) -> RunStatus:
    lines = text_of(run / "metrics.jsonl").splitlines()
    step = int(last_measured(lines[-3:], ["step"]).get("step", 0))  # the very last may be torn
    steps = settings.get("steps")
    steps = steps if isinstance(steps, int) else 0
    state, remark = state_of(run, holder, is_finished=(run / "model").is_dir())

    # A run that stops saves its last step first: one with later steps than its checkpoints was cut short.
    saved = max(checkpoint_steps(run), default=0)
    if state == "stopped" and step > saved:
        state = "failed"
        remark = (
            f"it ended without a word after step {step}, and goes on from {f'step {saved}' if saved else 'its start'}"
        )
    left = None
    if state == "running" and steps:
        left = seconds_left([numbers_of(text) for text in lines[-PACE - 1 :]], steps - step, time.time())
    return RunStatus(run, command_of(settings), state, step, steps, last_measured(lines, SHOWN), left, changed, remark)


def evaluation_status(run: Path, settings: dict[str, Any], holder: Holder | None, changed: float) -> RunStatus:
    answers = text_of(run / "answers.jsonl").count("\n")
    problems = read_mapping(run / "sampled_from.json").get("problems")
    samples = settings.get("samples")
    of_all = len(problems) * samples if isinstance(problems, dict) and isinstance(samples, int) else 0
    card = read_mapping(run / "eval_card.json")
    state, remark = state_of(run, holder, is_finished=bool(card))
    metrics = card.get("metrics")
    numbers = only_numbers(metrics) if isinstance(metrics, dict) else {}
    return RunStatus(run, "eval", state, answers, of_all, numbers, None, changed, remark)


def state_of(run: Path, holder: Holder | None, is_finished: bool) -> tuple[RunState, str]:
    """The state that a run is in as far as lock and files tell, and a remark."""
    if holder and holder.liveness == "dead":
        heirs = " ".join(map(str, holder.heirs)) or "what it left behind"
        return "failed", f"its process {holder.pid} is dead and its lock still held: kill {heirs}"
    if holder and holder.liveness == "suspended":
        return "suspended", f"kill -CONT {holder.pid} lets it go on"
    if holder:
        return "running", f"process {holder.pid}" if holder.pid else "on another machine or in a container"
    if is_finished:
        return "finished", ""
    if (run / "failure.txt").is_file():
        return "failed", failure_of(run)
    return "stopped", ""


def failure_of(run: Path) -> str:
    """The sentence of the process of a run that failed first, "" where it is torn."""
    try:
        content = json.loads(text_of(run / "failure.txt"))
    except (ValueError, RecursionError):
        return ""
    return str(content[0]) if isinstance(content, list) and content else ""


def seconds_left(lines: Sequence[Numbers], steps: int, now: float) -> float | None:
    """How long the last steps of a run will take at the pace of those before; None before its second.

    lines: the last ones of its metrics. steps: that are left.
    """
    times = [line["time"] for line in lines if "time" in line]
    took = [after - before for before, after in pairwise(times) if after >= before]  # a clock may be set back
    if not took:
        return None
    # The gap of a restart is no step; an evaluation, which takes as long as some steps, is part of the pace.
    usual = [seconds for seconds in took if seconds <= 20 * median(took)]
    return max(0.0, fmean(usual) * steps - (now - times[-1]))


def last_change(run: Path) -> float:
    """When a run last wrote into its directory."""
    names = ("metrics.jsonl", "answers.jsonl", "eval_card.json", "environment.json", "config.yaml")
    times = [0.0]
    for name in names:
        try:
            times.append((run / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)
