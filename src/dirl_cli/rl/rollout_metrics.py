"""What a rollout looks like: as metrics, as records on the disk, and as a table of a few answers."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from rich.table import Table
from rich.text import Text

from dirl_cli.rl.rollouts import Answers
from dirl_cli.rollout.storage import Record


def rollout_metrics(sampled: Sequence[Answers], groups: Sequence[Answers], group_size: int) -> dict[str, float]:
    """Means over a step's answers, before the filter and after it (`kept_…`).

    kept: the share of sampled groups with a signal. excluded: how many of `group_size` answers to each problem have
    no reward; 0 where it is not known how many there should be.
    """
    answers = [record for group in sampled for record in group]
    metrics: dict[str, float] = {"groups": len(groups)}
    if (excluded := len(sampled) * group_size - len(answers)) > 0:
        metrics["excluded"] = excluded
    if not answers:
        return metrics

    trajectories = [record.trajectory for record in answers]
    tokens = sum(len(one.token_ids) for one in trajectories)
    metrics |= {
        "reward": fmean(record.reward or 0.0 for record in answers),
        "accuracy": fmean(record.correct for record in answers),
        "length": fmean(len(one.completion_ids) for one in trajectories),
        "truncated": fmean(one.stop_reason == "length" for one in trajectories),
        "tokens_per_forward": tokens / sum(one.forwards for one in trajectories),
        "tokens_per_denoising_forward": tokens / sum(one.denoise_forwards for one in trajectories),
        "kept": fmean(any(record.kept for record in group) for group in sampled),
    }
    for part in answers[0].parts:
        metrics[f"reward/{part}"] = fmean(record.parts[part] for record in answers)

    kept = [record for group in groups for record in group]
    if kept:
        metrics["kept_reward"] = fmean(record.reward or 0.0 for record in kept)
        metrics["kept_accuracy"] = fmean(record.correct for record in kept)
    return metrics


def records(groups: Sequence[Answers], sampled: Sequence[Answers]) -> list[Record]:
    """What a step learned from, then what it sampled besides, be it for a later step."""
    used = {id(record.trajectory) for group in groups for record in group}
    unused = [replace(one, kept=False) for group in sampled for one in group if id(one.trajectory) not in used]
    return [record for group in groups for record in group] + unused


def answer_table(groups: Sequence[Answers], step: int, rows: int = 3) -> Table:
    """A few sampled answers with their rewards, the worst and the best of each of the first groups."""
    table = Table(title=f"step {step}", title_justify="left", show_lines=True)
    for column in ("question", "answer", "reward"):
        table.add_column(column, overflow="fold")
    for group in [group for group in groups if group][:rows]:
        ordered = sorted(group, key=lambda record: record.reward or 0.0)
        for record in (ordered[0], ordered[-1]):
            table.add_row(Text(record.problem.question), Text(record.completion[:400]), f"{record.reward:.2f}")
    return table
