"""What a rollout looks like: as metrics, as records on the disk, and as a table of a few answers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean

from rich.table import Table
from rich.text import Text

from dirl_cli.rl.groups import Group
from dirl_cli.rl.rollout_state import Rollout
from dirl_cli.rollout.storage import Record


def rollout_metrics(rollout: Rollout, group_size: int) -> dict[str, float]:
    """Means over a step's answers, before hints and the filter, and after both (`kept_…`).

    kept: the share of sampled groups with a signal. hinted: the share that was all wrong, and so sampled again with
    hints. hinted_accuracy: the share of these further answers that is right. excluded: how many of `group_size` answers
    to each problem have no reward; 0 where it is not known how many there should be. too_stale: groups with a signal
    that were dropped for the age of their weights. Of `excluded` and `too_stale` there is nothing where there are none.
    """
    answers = [record for record in chain.from_iterable(rollout.sampled) if not record.trajectory.is_hinted]
    metrics: dict[str, float] = {"groups": len(rollout.groups)}
    excluded = len(rollout.sampled) * group_size - len(answers)
    if excluded > 0:
        metrics["excluded"] = excluded
    if rollout.too_stale:
        metrics["too_stale"] = rollout.too_stale
    if not answers:
        return metrics

    trajectories = [record.trajectory for record in answers]
    tokens = sum(len(trajectory.token_ids) for trajectory in trajectories)
    metrics |= {
        "reward": fmean(record.reward or 0.0 for record in answers),
        "accuracy": fmean(record.correct for record in answers),
        "length": fmean(len(trajectory.completion_ids) for trajectory in trajectories),
        "truncated": fmean(trajectory.stop_reason == "length" for trajectory in trajectories),
        "tokens_per_forward": tokens / sum(trajectory.forwards for trajectory in trajectories),
        "tokens_per_denoising_forward": tokens / sum(trajectory.denoise_forwards for trajectory in trajectories),
        "kept": rollout.num_with_signal / len(rollout.sampled),
    }
    for name in answers[0].parts:
        metrics[f"reward/{name}"] = fmean(record.parts[name] for record in answers)

    if any(record.process for record in answers):
        metrics["process_reward"] = fmean(sum(record.process) for record in answers)

    if rollout.hinted is not None:
        metrics["hinted"] = len(rollout.hinted) / len(rollout.sampled)
    if hinted := list(chain.from_iterable(rollout.hinted or [])):
        metrics["hinted_accuracy"] = fmean(record.correct for record in hinted)

    learned_from = list(chain.from_iterable(rollout.groups))
    if learned_from:
        metrics["kept_reward"] = fmean(record.reward or 0.0 for record in learned_from)
        metrics["kept_accuracy"] = fmean(record.correct for record in learned_from)
    return metrics


def records(groups: Sequence[Group], sampled: Sequence[Group]) -> list[Record]:
    """What a step learned from, then what it sampled besides, be it for a later step."""
    learned_from = list(chain.from_iterable(groups))
    used = {id(record.trajectory) for record in learned_from}
    unused = [record for record in chain.from_iterable(sampled) if id(record.trajectory) not in used]
    return learned_from + [replace(record, learned_from=False) for record in unused]


def answer_table(groups: Sequence[Group], step: int, rows: int = 3) -> Table:
    """A few sampled answers with their rewards, the worst and the best of each of the first groups."""
    table = Table(title=f"step {step}", title_justify="left", show_lines=True)
    for column in ("question", "answer", "reward"):
        table.add_column(column, overflow="fold")
    for group in [group for group in groups if group][:rows]:
        ordered = sorted(group, key=lambda record: record.reward or 0.0)
        for record in (ordered[0], ordered[-1]):
            table.add_row(Text(record.problem.question), Text(record.completion[:400]), f"{record.reward:.2f}")
    return table
