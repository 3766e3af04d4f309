"""The strips of a step's answers: which answers share one, and each of them when and where it is needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Generator

from dirl_cli.diffusion.layout import Strip, common_blocks, join_strips, without_first
from dirl_cli.diffusion.states import BlockSpec, Views
from dirl_cli.distributed import split_by_cost
from dirl_cli.types import Trajectory

SEEDS = 2**62  # as many different ones


@dataclass(frozen=True)
class Part:
    """Which of the processes that train together this is, and how many there are.

    gather: joins their lists; every process has to call.
    """

    index: int
    count: int
    gather: Callable[[list[Any]], list[Any]]


ALONE = Part(0, 1, lambda own: own)


@dataclass(frozen=True)
class AnswerSpan:
    """Successive answers of a group that share a strip.

    group: of the strips'. first: which of all answers is the first. count: of answers. tokens, scored: of the strip.
    """

    group: int
    first: int
    count: int
    tokens: int
    scored: int


class AnswerStrips:
    """Strips of groups of answers in some views, laid out one by one.

    A strip depends on its own answers alone, so that any process can lay it out without the others. What the answers
    of a group begin with in common is laid out once, as long as they fit into a row together.

    generator: of what is random in the views. keeps_groups: whether those of a group share a strip in any case.
    fillers: by group, how many tokens at the beginning of its prompts only keep a place and are seen by nothing; none
    unless given.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Trajectory]],
        views: Views,
        spec: BlockSpec,
        row_tokens: int,
        generator: Generator,
        keeps_groups: bool = False,
        fillers: Sequence[int] = (),
    ) -> None:
        self.groups = groups
        self.trajectories = list(chain.from_iterable(groups))
        self.spec = spec
        self._views = views
        self._row_tokens = row_tokens
        self._keeps_groups = keeps_groups
        self._fillers = fillers or [0] * len(groups)
        self._first = [0, *accumulate(map(len, groups))]  # answers before each group
        self._seeds = torch.randint(SEEDS, (len(self.trajectories),), generator=generator).tolist()
        self._waiting: dict[int, Strip] = {}  # by first answer: laid out, and not asked for yet

    def spans(self, group: int) -> list[AnswerSpan]:
        """Which answers of a group share a strip."""
        first = self._first[group]
        strips = [self._answer(i) for i in range(first, self._first[group + 1])]
        together = [strips] if self._keeps_groups else fitting(strips, self._row_tokens, self.spec.block_size)
        spans = []
        for answers in together:
            strip = self._joined(group, answers)
            self._waiting[first] = strip
            spans.append(AnswerSpan(group, first, len(answers), len(strip), len(strip.targets)))
            first += len(answers)
        return spans

    def strip(self, span: AnswerSpan) -> Strip:
        """The strip of a span, whichever process found it."""
        waiting = self._waiting.pop(span.first, None)
        if waiting is not None:
            return waiting
        return self._joined(span.group, [self._answer(i) for i in range(span.first, span.first + span.count)])

    def _answer(self, i: int) -> Strip:
        return self._views(self.trajectories[i], self.spec, Generator().manual_seed(self._seeds[i]))

    def _joined(self, group: int, answers: Sequence[Strip]) -> Strip:
        return without_first(join_strips(answers, self.spec.block_size), self._fillers[group])


def all_spans(strips: AnswerStrips, part: Part = ALONE) -> list[AnswerSpan]:
    """The spans of all groups in order, of which each process lays out about as many tokens."""
    costs = [sum(len(answer.token_ids) for answer in group) for group in strips.groups]
    own: list[AnswerSpan] = []
    for group in split_by_cost(costs, part.count)[part.index]:
        own += strips.spans(group)
    return sorted(part.gather(own), key=lambda span: span.first)


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
