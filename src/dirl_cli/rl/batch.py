"""From sampled groups and their advantages to packed rows with everything an objective asks of each token."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.layout import Rows, Strip, common_blocks, join_strips, pack, without_first
from dirl_cli.diffusion.states import BlockSpec, Views
from dirl_cli.reward.process import by_step
from dirl_cli.rl.objective import Objective
from dirl_cli.types import HELD, Trajectory


@dataclass(frozen=True)
class TrajectoryGroup:
    """The answers to one problem, and what each is worth beside the others.

    process: what each answer's denoising steps or blocks earned, see reward/process.py; nothing where none did.
    filler: tokens that every prompt begins with and that nothing sees: they only keep a place.
    """

    trajectories: Sequence[Trajectory]
    advantages: Sequence[float]
    process: Sequence[Sequence[float]] = ()
    filler: int = 0


def objective_rows(
    groups: Sequence[TrajectoryGroup],
    objective: Objective,
    spec: BlockSpec,
    pad_id: int,
    row_tokens: int,
    train_tail: bool,
    generator: Generator,
) -> tuple[Rows, list[int]]:
    """Packed rows of the groups' trajectories in the objective's views, and each answer's number of trained tokens.

    Extras of each scored token: those of `answer_rows`, its advantage, sampler_logprobs and the version of the weights
    that it was sampled from; and process_reward where there are any.
    """
    trajectories = list(chain.from_iterable(group.trajectories for group in groups))
    advantages = list(chain.from_iterable(group.advantages for group in groups))
    lengths = trained_lengths(trajectories, train_tail)
    if objective.mask_overlong:
        for i, trajectory in enumerate(trajectories):
            if trajectory.stop_reason == "length":
                lengths[i] = 0

    answers = [group.trajectories for group in groups]
    fillers = [group.filler for group in groups]
    rows = answer_rows(answers, lengths, objective.views, spec, pad_id, row_tokens, generator, fillers=fillers)
    sample, index = rows.extras["sample"], rows.extras["index"]
    extras = {
        "advantage": torch.tensor(advantages)[sample],
        "version": torch.tensor([trajectory.weights_version for trajectory in trajectories])[sample],
        "sampler_logprobs": padded([trajectory.logprobs for trajectory in trajectories])[sample, index],
    }
    process = list(chain.from_iterable(group.process for group in groups))
    if any(process):
        shares = [reward_shares(*pair, spec.block_size) for pair in zip(trajectories, process, strict=True)]
        extras["process_reward"] = padded(shares)[sample, index]
    return rows.with_extras(**extras), revealed_lengths(trajectories, lengths)


def answer_rows(
    groups: Sequence[Sequence[Trajectory]],
    lengths: Sequence[int],
    views: Views,
    spec: BlockSpec,
    pad_id: int,
    row_tokens: int,
    generator: Generator,
    keeps_groups: bool = False,
    fillers: Sequence[int] | None = None,
) -> Rows:
    """Packed rows of groups of answers in these views. Tokens that were held are context, like a prompt's.

    What the answers of a group begin with in common is laid out once, as long as they fit into a row together; with
    `keeps_groups` they are in one row in any case.
    lengths: how many tokens of each answer are trained, from its first on; those after them weigh 0. fillers: by group,
    how many tokens at the beginning of its prompts only keep a place and are seen by nothing; none unless given.
    Extras of each scored token: `sample`, the answer it belongs to, counted over all groups; `index`, which of its
    tokens it is; and `length`, the trained tokens of its answer that were not held, or 1 where there are none.
    """
    strips: list[Strip] = []
    sizes = []  # answers in each strip
    for group, filler in zip(groups, fillers or [0] * len(groups), strict=True):
        answers = [views(trajectory, spec, generator) for trajectory in group]
        runs = [answers] if keeps_groups else fitting(answers, row_tokens, spec.block_size)
        for joined in runs:
            strips.append(without_first(join_strips(joined, spec.block_size), filler))
            sizes.append(len(joined))
    rows = pack(strips, row_tokens, spec.block_size, pad_id)

    # Of a group that is too long for a row there are several strips.
    first_of_strip = torch.tensor([0, *accumulate(sizes)])
    sample = first_of_strip[rows.at_targets(rows.strip)] + rows.at_targets(rows.sequence) - 1  # (N,)
    trajectories = list(chain.from_iterable(groups))
    prompt_lengths = torch.tensor([len(trajectory.prompt_ids) for trajectory in trajectories])
    index = rows.at_targets(rows.position) - prompt_lengths[sample]  # (N,)
    length = torch.tensor(revealed_lengths(trajectories, lengths))[sample]  # (N,)
    extras = {"sample": sample, "index": index, "length": length.clamp(min=1).float()}
    return replace(rows, weight=rows.weight * (index < torch.tensor(lengths)[sample]), extras=extras)


def trained_lengths(trajectories: Sequence[Trajectory], train_tail: bool) -> list[int]:
    """How many tokens of each answer are trained.

    train_tail: whether those after the stop token, which fill up its block, are among them.
    """
    if train_tail:
        return [len(trajectory.token_ids) for trajectory in trajectories]
    return [trained_length(trajectory) for trajectory in trajectories]


def revealed_lengths(trajectories: Sequence[Trajectory], lengths: Sequence[int]) -> list[int]:
    """How many of the first `lengths` tokens of each answer were not held."""
    pairs = zip(trajectories, lengths, strict=True)
    return [length - trajectory.reveal_step[:length].count(HELD) for trajectory, length in pairs]


def fitting(strips: Sequence[Strip], row_tokens: int, block_size: int) -> list[list[Strip]]:
    """The strips in order, in runs of at most `row_tokens` tokens once they are joined."""
    runs: list[list[Strip]] = []
    for strip in strips:
        if runs and joined_length([*runs[-1], strip], block_size) <= row_tokens:
            runs[-1].append(strip)
        else:
            runs.append([strip])
    return runs


def joined_length(strips: Sequence[Strip], block_size: int) -> int:
    return sum(map(len, strips)) - (len(strips) - 1) * common_blocks(strips, block_size)


def reward_shares(trajectory: Trajectory, values: Sequence[float], block_size: int) -> list[float]:
    """Each token's share of what its denoising step earned. values: of steps or blocks, see reward/process.py."""
    if not values:
        return [0.0] * len(trajectory.token_ids)
    tokens_of_step = Counter(steps_of_tokens(trajectory, block_size))
    steps = sorted(step for step in tokens_of_step if step[1] != HELD)
    reward = dict(zip(steps, by_step(values, steps_of_blocks(trajectory, block_size)), strict=True))
    return [reward.get(step, 0.0) / tokens_of_step[step] for step in steps_of_tokens(trajectory, block_size)]


def steps_of_blocks(trajectory: Trajectory, block_size: int) -> list[int]:
    """The number of denoising steps in each block of the answer; 0 of one that was held whole."""
    steps: dict[int, set[int]] = {}
    for block, step in steps_of_tokens(trajectory, block_size):
        steps.setdefault(block, set()).add(step)
    return [len(of_block - {HELD}) for of_block in steps.values()]


def steps_of_tokens(trajectory: Trajectory, block_size: int) -> list[tuple[int, int]]:
    """Each answer token's block and the step of it that revealed it; steps happened in the order of these pairs.

    The step is HELD for a token that none revealed.
    """
    first = len(trajectory.prompt_ids)
    return [((first + i) // block_size, step) for i, step in enumerate(trajectory.reveal_step)]


def trained_length(trajectory: Trajectory) -> int:
    """Answer tokens up to and with the stop token."""
    return min(len(trajectory.completion_ids) + 1, len(trajectory.token_ids))


def padded(lists: Sequence[Sequence[float]]) -> Tensor:
    """Lists of different lengths as one tensor, zeros at the ends."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(values) for values in lists], batch_first=True)
