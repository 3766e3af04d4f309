"""What lm-evaluation-harness measured: scores by task, as a table, a CSV file and a card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirl_cli.evaluation import report
from dirl_cli.evaluation.result_card import CARD
from dirl_cli.text import counted

SPEEDS = {"tokens_per_denoising_forward": "tokens per denoising forward", "tokens_per_forward": "per forward"}


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task. filter: how lm-eval took it out of the answers; error: its standard error where known."""

    task: str
    metric: str
    filter: str
    value: float
    error: float | None


def scores_of(results: Mapping[str, Mapping[str, Any]]) -> list[TaskScore]:
    """The scores among lm-eval's results: by task, `metric,filter` and `metric_stderr,filter`."""
    scores = []
    for task, values in results.items():
        for name, value in values.items():
            metric, _, filter_name = name.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            known = float(error) if isinstance(error, int | float) else None
            scores.append(TaskScore(task, metric, filter_name, float(value), known))
    return scores


def score_text(score: TaskScore) -> str:
    """Such as 0.6320 ± 0.0133."""
    text = f"{score.value:.4f}"
    return f"{text} ± {score.error:.4f}" if score.error is not None else text


def score_name(score: TaskScore) -> str:
    """Such as gsm8k exact_match (strict-match); the filter `none` is left out."""
    name = f"{score.task} {score.metric}"
    return name if score.filter == "none" else f"{name} ({score.filter})"


def scores_table(title: str, scores: Sequence[TaskScore]) -> report.Fitting:
    """The table of one evaluation."""
    return report.draw(title, {score_name(score): {"value": score_text(score)} for score in scores})


def facts_text(facts: Mapping[str, float]) -> str:
    """The lines below the table: what was measured beside the scores."""
    lines = ["±: standard error over the task's documents, as lm-eval tells it."]
    speeds = [f"{facts[name]:.2f} {words}" for name, words in SPEEDS.items() if name in facts]
    if speeds:
        lines.append(f"{', '.join(speeds)}, over the {counted(int(facts['answers']), 'answer')} sampled now.")
    if "elbo_standard_error" in facts:
        lines.append(f"Log-likelihoods are ELBOs, ± {facts['elbo_standard_error']:.3f} nats each on average.")
    return "\n".join(lines)


def score_line(scores: Sequence[TaskScore], facts: Mapping[str, float]) -> dict[str, str | int | float]:
    """An evaluation as one line of a CSV file."""
    line: dict[str, str | int | float] = {}
    for score in scores:
        line[score_name(score)] = score.value
        if score.error is not None:
            line[f"{score_name(score)} stderr"] = score.error
    return line | {name: facts[name] for name in (*SPEEDS, "elbo_standard_error") if name in facts}


def scores_by_job(
    jobs: Sequence[tuple[Sequence[str], Path]],
) -> dict[str, tuple[list[TaskScore], dict[str, float]]]:
    """The scores of a sweep's jobs, and what was measured beside them; empty where one asked something else."""
    by_job = {}
    for overrides, out in jobs:
        card = json.loads((out / CARD).read_bytes())
        if "harness" not in card:
            return {}
        by_job[", ".join(overrides)] = (scores_of(card["results"]), card["facts"])
    return by_job
