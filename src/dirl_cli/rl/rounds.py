"""Rounds: problems that are drawn together, and what there is of the answers to them.

With `rl.async_rollout` above 1 several are under way at once, and a push of new weights finds some answers half done.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from dirl_cli.rl.groups import Group
from dirl_cli.rollout.storage import Record, from_json, to_json, trajectory_from_json, trajectory_to_json
from dirl_cli.types import Trajectory

Indexed = tuple[int, Record]  # an answer, and where in the endless order its problem stands
Partial = tuple[int, int, Trajectory]  # an answer under way: that place, which sample it is, and its blocks so far
Outcome = tuple[int, int, int, Record | Trajectory]  # the place of a round among others, then as the two above


@dataclass(frozen=True)
class Round:
    """Problems of the endless order, each to be answered `group_size` times.

    step, number: for which step they were drawn (from 0), and by which of its draws: these are in the answers' seeds.
    indices: where in the order they stand. drawn: how many problems are drawn with them. answers: those that have
    ended; without a reward where that could not be computed. under_way: what there is of others.
    """

    step: int
    number: int
    indices: list[int]
    drawn: int
    group_size: int
    answers: list[Indexed] = field(default_factory=list)
    under_way: list[Partial] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many answers there are to be."""
        return len(self.indices) * self.group_size

    @property
    def is_whole(self) -> bool:
        return len(self.answers) == self.size

    @property
    def missing(self) -> list[int]:
        """The indices of problems to which answers are missing."""
        ended = Counter(index for index, _ in self.answers)
        return [index for index in self.indices if ended[index] < self.group_size]

    @property
    def groups(self) -> list[Group]:
        """The rewarded answers to each problem, by sample."""
        by_index: dict[int, Group] = {index: [] for index in self.indices}
        for index, record in self.answers:
            if record.reward is not None:
                by_index[index].append(record)
        return [sorted(group, key=lambda record: record.sample) for group in by_index.values()]

    @property
    def lengths(self) -> dict[int, float]:
        """The mean length of the answers to each problem in tokens, by its index."""
        tokens: dict[int, list[int]] = {}
        for index, record in self.answers:
            tokens.setdefault(index, []).append(len(record.trajectory.token_ids))
        return {index: fmean(of_answers) for index, of_answers in tokens.items()}

    def take(self, answers: Sequence[Indexed], under_way: Sequence[Partial]) -> "Round":
        """The round with more answers, and what there is now of those that have not ended."""
        in_order = sorted([*self.answers, *answers], key=lambda answer: (answer[0], answer[1].sample))
        return replace(self, answers=in_order, under_way=sorted(under_way, key=lambda partial: partial[:2]))

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "answers": [[index, to_json(record)] for index, record in self.answers],
            "under_way": [[index, sample, trajectory_to_json(part)] for index, sample, part in self.under_way],
        }

    @staticmethod
    def from_json(saved: dict[str, Any]) -> "Round":
        answers = [(index, from_json(record)) for index, record in saved["answers"]]
        under_way = [(index, sample, trajectory_from_json(part)) for index, sample, part in saved["under_way"]]
        return Round(**{**saved, "answers": answers, "under_way": under_way})


def with_outcomes(rounds: Sequence[Round], outcomes: Sequence[Outcome]) -> list[Round]:
    """The rounds after a stint, with the answers that ended in it and what it left under way."""
    taken = []
    for place, one in enumerate(rounds):
        answers: list[Indexed] = []
        under_way: list[Partial] = []
        for at, index, sample, outcome in outcomes:
            if at == place and isinstance(outcome, Record):
                answers.append((index, outcome))
            elif at == place and isinstance(outcome, Trajectory):
                under_way.append((index, sample, outcome))
        taken.append(one.take(answers, under_way))
    return taken
