"""The groups that a step samples and learns from: what their answers earned, and are worth beside each other."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from dirl_cli.errors import DirlError
from dirl_cli.reward.process import RevealedBlock
from dirl_cli.reward.ranking import Contender
from dirl_cli.reward.scoring import RewardResult, RewardSettings
from dirl_cli.rl.advantages import AdvantageEstimator, GroupRewards, has_signal
from dirl_cli.rl.batch import steps_of_tokens
from dirl_cli.rollout.storage import Record, from_json, to_json
from dirl_cli.types import HELD, Trajectory

Group = list[Record]  # the group of one problem: the answers to it, with what they earned
Decode = Callable[[list[int]], str]


def groups_to_json(groups: Sequence[Group]) -> list[list[dict[str, Any]]]:
    return [list(map(to_json, group)) for group in groups]


def groups_from_json(groups: list[list[dict[str, Any]]]) -> list[Group]:
    return [list(map(from_json, group)) for group in groups]


def revealed_blocks(decode: Decode | None, trajectory: Trajectory, block_size: int) -> tuple[RevealedBlock, ...]:
    """An answer's blocks with the texts that their steps revealed; none without `decode`."""
    if decode is None:
        return ()
    by_block: dict[int, dict[int, list[int]]] = {}  # token ids by block and step
    for token, (block, step) in zip(trajectory.token_ids, steps_of_tokens(trajectory, block_size), strict=True):
        by_block.setdefault(block, {}).setdefault(step, []).append(token)

    first = len(trajectory.prompt_ids)
    blocks = []
    for block, steps in by_block.items():
        own = slice(max(block * block_size - first, 0), (block + 1) * block_size - first)
        texts = [tuple(decode([token]) for token in steps[step]) for step in sorted(steps) if step != HELD]
        blocks.append(RevealedBlock(decode(trajectory.token_ids[own]), tuple(texts)))
    return tuple(blocks)


def group_has_signal(group: Group, rule: str) -> bool:
    """Whether a group is worth learning from; see `has_signal`."""
    rewards = [record.reward or 0.0 for record in group]
    return len(group) > 0 and has_signal(rewards, [record.correct for record in group], rule)


def pass_rate(group: Group) -> float | None:
    """The share of a group's answers that are correct; None where none is left."""
    return fmean(record.correct for record in group) if group else None


def with_reward(record: Record, result: RewardResult) -> Record:
    return replace(record, reward=result.total, parts=result.parts, process=result.process, correct=result.correct)


def ranked_group(group: Group, settings: RewardSettings, block_size: int) -> Group:
    """The group with the rewards that compare its answers, where there are any.

    An answer's forwards are as its reveal steps tell. block_size: that they were sampled in where they do not say.
    """
    if not settings.ranks:
        return group
    contenders = []
    for record in group:
        answer = record.trajectory
        forwards = max(answer.revealed_at(answer.block_size or block_size))
        contenders.append(Contender(record.correct, len(answer.completion_ids), forwards, answer.is_hinted))
    rewards = settings.ranked(contenders, [record.parts for record in group])
    return [replace(record, reward=reward, parts=parts) for record, (reward, parts) in zip(group, rewards, strict=True)]


def add_advantages(groups: Sequence[Group], estimator: AdvantageEstimator) -> list[Group]:
    """The groups with each answer's advantage over the others to its problem."""
    advantages = estimator([rewards_of(group, estimator.parts) for group in groups])
    with_advantages = []
    for group, values in zip(groups, advantages, strict=True):
        pairs = zip(group, values.tolist(), strict=True)
        with_advantages.append([replace(record, advantage=value, learned_from=True) for record, value in pairs])
    return with_advantages


def rewards_of(group: Group, parts: Sequence[str]) -> GroupRewards:
    """What a group's answers earned. parts: the names of the rewards that are compared one by one.

    Raises DirlError for a replayed answer that lacks one of them.
    """
    for record in group:
        missing = [name for name in parts if name not in record.parts]
        if missing:
            raise DirlError(f"an answer on record has no reward {missing[0]}: reward it anew with rl.rescore=true")
    return GroupRewards(
        total=torch.tensor([record.reward for record in group]),
        parts=torch.tensor([[record.parts[name] for name in parts] for record in group]),
        tokens=torch.tensor([record.trajectory.num_revealed for record in group]),
    )
