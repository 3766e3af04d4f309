"""From sampled groups and their advantages to packed rows with everything an objective asks of each token."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.layout import Rows, fill_rows, first_fit
from dirl_cli.diffusion.states import BlockSpec, Views, as_floats
from dirl_cli.reward.process import by_step
from dirl_cli.rl.answer_strips import ALONE, AnswerSpan, AnswerStrips, Part, all_spans
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


class ObjectiveRows:
    """Packed rows of groups of trajectories in an objective's views, made when they are asked for.

    All processes know how the rows are packed, for which each lays out its share of the groups; then each makes those
    that it computes.
    bins: the strips in each row. lengths: each answer's number of trained tokens. num_tokens: of all rows, without
    padding. num_scored: how often tokens are scored in them.
    """

    def __init__(
        self,
        groups: Sequence[TrajectoryGroup],
        objective: Objective,
        spec: BlockSpec,
        pad_id: int,
        row_tokens: int,
        train_tail: bool,
        generator: Generator,
        part: Part = ALONE,
    ) -> None:
        self._trajectories = list(chain.from_iterable(group.trajectories for group in groups))
        self._advantages = torch.tensor(list(chain.from_iterable(group.advantages for group in groups)))
        self._process = list(chain.from_iterable(group.process for group in groups))
        self._pad_id = pad_id
        self._trained = trained_lengths(self._trajectories, train_tail)
        if objective.mask_overlong:
            for i, trajectory in enumerate(self._trajectories):
                if trajectory.stop_reason == "length":
                    self._trained[i] = 0
        self.lengths = revealed_lengths(self._trajectories, self._trained)

        answers = [group.trajectories for group in groups]
        fillers = [group.filler for group in groups]
        self._strips = AnswerStrips(answers, objective.views, spec, row_tokens, generator, fillers=fillers)
        self._spans = all_spans(self._strips, part)
        self.bins = first_fit([span.tokens for span in self._spans], row_tokens)
        self.num_tokens = sum(span.tokens for span in self._spans)
        self.num_scored = sum(span.scored for span in self._spans)

    def rows(self, bins: Sequence[Sequence[int]]) -> Rows:
        """Some of the rows.

        Extras of each scored token: those of `packed_spans`, its advantage, sampler_logprobs and the version of the
        weights that it was sampled from; and process_reward where there are any.
        """
        rows = packed_spans(self._strips, self._spans, bins, self._trained, self.lengths, self._pad_id)
        sample, index = rows.extras["sample"], rows.extras["index"]
        extras = {
            "advantage": self._advantages[sample],
            "version": of_tokens(lambda i: self._trajectories[i].token_versions, sample, index).long(),
            "sampler_logprobs": of_tokens(lambda i: self._trajectories[i].logprobs, sample, index),
        }
        if any(self._process):
            extras["process_reward"] = of_tokens(self._reward_shares, sample, index)
        return rows.with_extras(**extras)

    def _reward_shares(self, answer: int) -> list[float]:
        return reward_shares(self._trajectories[answer], self._process[answer], self._strips.spec.block_size)


def answer_rows(
    groups: Sequence[Sequence[Trajectory]],
    lengths: Sequence[int],
    views: Views,
    spec: BlockSpec,
    pad_id: int,
    row_tokens: int,
    generator: Generator,
) -> Rows:
    """Packed rows of groups of answers in these views, each group in one row however long; see `packed_spans`.

    lengths: how many tokens of each answer are trained, from its first on; those after them weigh 0.
    """
    strips = AnswerStrips(groups, views, spec, row_tokens, generator, keeps_groups=True)
    spans = all_spans(strips)
    bins = first_fit([span.tokens for span in spans], row_tokens)
    revealed = revealed_lengths(list(chain.from_iterable(groups)), lengths)
    return packed_spans(strips, spans, bins, lengths, revealed, pad_id)


def packed_spans(
    strips: AnswerStrips,
    spans: Sequence[AnswerSpan],
    bins: Sequence[Sequence[int]],
    trained: Sequence[int],
    revealed: Sequence[int],
    pad_id: int,
) -> Rows:
    """Rows of the strips of these spans. Tokens that were held are context, like a prompt's.

    trained: how many tokens of each answer are, from its first on; those after them weigh 0. revealed: how many of
    those were not held.
    Extras of each scored token: `sample`, the answer it belongs to, counted over all groups; `index`, which of its
    tokens it is; and `length`, the trained tokens of its answer that were not held, or 1 where there are none.
    """
    laid_out = {i: strips.strip(spans[i]) for i in chain.from_iterable(bins)}
    rows = fill_rows(bins, laid_out, strips.spec.block_size, pad_id)

    # Of a group that is too long for a row there are several strips.
    first_of_strip = torch.tensor([span.first for span in spans])
    sample = first_of_strip[rows.at_targets(rows.strip)] + rows.at_targets(rows.sequence) - 1  # (N,)
    prompt_lengths = torch.tensor([len(trajectory.prompt_ids) for trajectory in strips.trajectories])
    index = rows.at_targets(rows.position) - prompt_lengths[sample]  # (N,)
    length = torch.tensor(revealed)[sample]  # (N,)
    extras = {"sample": sample, "index": index, "length": length.clamp(min=1).float()}
    return replace(rows, weight=rows.weight * (index < torch.tensor(trained)[sample]), extras=extras)


def of_tokens(values_of: Callable[[int], Sequence[float]], sample: Tensor, index: Tensor) -> Tensor:
    """A value for each scored token: (N,). values_of: an answer, gives those of its tokens. sample, index: (N,)."""
    answers, row = sample.unique(return_inverse=True)
    values = [as_floats(values_of(i)) for i in answers.tolist()]
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)[row, index]


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
