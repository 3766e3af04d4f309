"""Pairs of answers to learn from: texts of a file, or sampled answers of a run with their reveal steps."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from dirl_cli.data.chat import Encoded
from dirl_cli.data.order import generator
from dirl_cli.data.tokens import PairTable
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rl.batch import steps_of_tokens
from dirl_cli.rollout.storage import Record, distinct, problem_key, read_lines, require_learnable, rollout_files
from dirl_cli.text import counted
from dirl_cli.types import Trajectory


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, the first of them preferred."""

    chosen: Trajectory
    rejected: Trajectory

    @property
    def answers(self) -> tuple[Trajectory, Trajectory]:
        return self.chosen, self.rejected


class Pairs(Protocol):
    """Pairs by their number.

    lengths: tokens of the longer of a pair's sequences; costs: about in proportion to what a pair takes in a row: (P,)
    each.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Pair: ...
    @property
    def lengths(self) -> NDArray[np.int64]: ...
    @property
    def costs(self) -> NDArray[np.int64]: ...
    @property
    def digest(self) -> str: ...


def all_of(pairs: Pairs) -> list[Pair]:
    """All pairs in order."""
    return [pairs[i] for i in range(len(pairs))]


@dataclass(frozen=True)
class TextPairs:
    """Pairs of a file, each answer made whole blocks when it is asked for; how it came about is not known."""

    table: PairTable
    block_size: int
    pad_id: int
    stop_token_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.table.chosen)

    def __getitem__(self, i: int) -> Pair:
        return Pair(self._answer(self.table.chosen[i]), self._answer(self.table.rejected[i]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.maximum(self.table.chosen.lengths, self.table.rejected.lengths)

    @property
    def costs(self) -> NDArray[np.int64]:
        return self.table.chosen.lengths + self.table.rejected.lengths

    @property
    def digest(self) -> str:
        return self.table.chosen.digest + self.table.rejected.digest

    def _answer(self, encoded: Encoded) -> Trajectory:
        return text_answer(encoded, self.block_size, self.pad_id, self.stop_token_ids)


def text_answer(encoded: Encoded, block_size: int, pad_id: int, stop_token_ids: tuple[int, ...]) -> Trajectory:
    """The last trained stretch of a text as an answer to all before it, padded to whole blocks.

    The padding is the answer's tail, since a sampler fills whole blocks too. When a token was revealed nobody knows:
    all are said to have been at the first step, which no view that is taken of texts looks at.
    """
    token_ids, trained = encoded
    start = len(token_ids)
    while start and trained[start - 1]:
        start -= 1
    padding = [pad_id] * (-len(token_ids) % block_size)
    answer = token_ids[start:] + padding
    return Trajectory(
        prompt_ids=token_ids[:start],
        token_ids=answer,
        reveal_step=[1] * len(answer),
        stop_reason="stop",
        stop_token_ids=stop_token_ids,
        block_size=block_size,
    )


@dataclass(frozen=True)
class SampledPairs:
    """Pairs of a run's answers."""

    pairs: Sequence[Pair]
    block_size: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Pair:
        return self.pairs[i]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([longer_length(pair) for pair in self.pairs], dtype=np.int64)

    @cached_property
    def costs(self) -> NDArray[np.int64]:
        """Tokens of a pair in its views: both sequences clean, and a block for each of their denoising steps."""
        costs = []
        for pair in self.pairs:
            cost = 0
            for answer in pair.answers:
                steps = len(set(steps_of_tokens(answer, self.block_size)))
                cost += len(answer.prompt_ids) + len(answer.token_ids) + steps * self.block_size
            costs.append(cost)
        return np.array(costs, dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """A SHA-256 that changes with any token or reveal step of any pair, and their order."""
        sha256 = hashlib.sha256()
        for pair in self.pairs:
            for answer in pair.answers:
                sha256.update(json.dumps([answer.prompt_ids, answer.token_ids, answer.reveal_step]).encode())
        return sha256.hexdigest()


def longer_length(pair: Pair) -> int:
    """Tokens of the longer of a pair's sequences."""
    return max(map(length_of, pair.answers))


def length_of(answer: Trajectory) -> int:
    """Tokens of an answer and its prompt."""
    return len(answer.prompt_ids) + len(answer.token_ids)


@dataclass(frozen=True)
class Pairing:
    """How the answers to a problem become pairs.

    rule: `right_wrong` pairs every right answer with every wrong one; `best_worst` the one of the highest reward with
    that of the lowest, then the second highest with the second lowest, as long as their rewards differ.
    limit: pairs of a problem at most; of more, `right_wrong` has `seed` draw them and `best_worst` takes those whose
    rewards differ most. held_out: problems whose pairs are not learned from, a share below 1, otherwise a number.
    longest: tokens of a prompt and answer.
    """

    rule: str
    limit: int
    held_out: float
    longest: int
    seed: int

    def pairs_of(self, answers: Sequence[Record], number: int) -> list[Pair]:
        """The pairs of the answers to problem `number`; none of two answers of the same tokens."""
        draws = generator(self.seed, number)
        if self.rule == "right_wrong":
            right = [record for record in answers if record.correct]
            wrong = [record for record in answers if not record.correct]
            candidates = list(product(right, wrong))
            order = torch.randperm(len(candidates), generator=draws).tolist()
            candidates = [candidates[i] for i in order]
        else:
            # Drawn first, and then sorted, so that chance decides between equal rewards.
            order = torch.randperm(len(answers), generator=draws).tolist()
            ranked = sorted((answers[i] for i in order), key=reward_of, reverse=True)
            half = len(ranked) // 2
            candidates = list(zip(ranked[:half], ranked[::-1][:half], strict=True))
            candidates = [(best, worst) for best, worst in candidates if reward_of(best) > reward_of(worst)]

        pairs = []
        for chosen, rejected in candidates:
            if chosen.trajectory.token_ids != rejected.trajectory.token_ids:
                pairs.append(Pair(chosen.trajectory, rejected.trajectory))
        return pairs[: self.limit]


def reward_of(record: Record) -> float:
    """An answer's reward; `read_answers` takes none without one."""
    return cast(float, record.reward)


@dataclass(frozen=True)
class RunPairs:
    """The pairs of a run's answers to learn from and to measure on; remarks: what there is to say of them."""

    training: SampledPairs
    held_out: SampledPairs
    remarks: list[str] = field(default_factory=list)


def read_answers(directory: Path, lm: DiffusionLM, needs_reward: bool) -> list[list[Record]]:
    """All answers of a run's rollouts but hinted ones, each once, by problem in the order in which these came up.

    Raises DirlError, with file and line, for an answer that nothing can be learned from.
    """
    if not directory.is_dir():
        raise DirlError(
            f"{directory} is not there: sample answers with `dirl rl rl.rollout_only=true out={directory}` first, or"
            " give dpo.pairs_from the directory of another run of `dirl rl`"
        )
    by_prompt: dict[tuple[str, tuple[int, ...]], list[Record]] = {}
    for line, record in distinct(learnable_answers(directory, lm)):
        if needs_reward and record.reward is None:
            raise DirlError(f"{line} has no reward to compare: give dpo.pairing=right_wrong, or another run")
        by_prompt.setdefault(problem_key(record), []).append(record)
    return list(by_prompt.values())


def learnable_answers(directory: Path, lm: DiffusionLM) -> Iterator[tuple[str, Record]]:
    """Each answer in a run's files of rollouts, with its file and line. Raises like `read_answers`."""
    for file in rollout_files(directory).values():
        for line, record in read_lines(file):
            require_learnable(line, record.trajectory, lm)
            yield line, record


def pairs_of_run(directory: Path, lm: DiffusionLM, pairing: Pairing) -> RunPairs:
    """Pair a run's answers to each problem. Raises DirlError where that leaves nothing to learn from."""
    problems = read_answers(directory, lm, pairing.rule == "best_worst")
    by_problem = []
    too_long = 0
    for number, answers in enumerate(problems):
        # Before they are paired, so that the limit is of pairs that can be learned from.
        fitting = [answer for answer in answers if length_of(answer.trajectory) <= pairing.longest]
        too_long += len(answers) - len(fitting)
        if pairs := pairing.pairs_of(fitting, number):
            by_problem.append(pairs)
    if not by_problem:
        raise nothing_to_pair(directory, pairing, problems)

    # Whole problems are held out, so that no prompt is both learned from and measured on.
    count = int(pairing.held_out)
    if pairing.held_out < 1:
        count = round(pairing.held_out * len(by_problem))
    if count >= len(by_problem):
        raise DirlError(
            f"{directory} has pairs of {counted(len(by_problem), 'problem')}, so {count} cannot be held out:"
            " lower dpo.held_out"
        )
    order = torch.randperm(len(by_problem), generator=generator(pairing.seed, len(by_problem))).tolist()
    unseen = set(order[:count])
    training: list[Pair] = []
    held_out: list[Pair] = []
    for i, pairs in enumerate(by_problem):
        (held_out if i in unseen else training).extend(pairs)

    answers_read = counted(sum(map(len, problems)), "answer")
    remarks = [
        f"{len(training):,} training and {len(held_out):,} held-out pairs of {counted(len(by_problem), 'problem')},"
        f" from {answers_read} to {len(problems):,} in {directory}"
    ]
    if too_long:
        remarks.append(
            f"{counted(too_long, 'answer')} left out that with the prompt hold more than max_tokens={pairing.longest}"
        )
    return RunPairs(SampledPairs(training, lm.block_size), SampledPairs(held_out, lm.block_size), remarks)


def nothing_to_pair(directory: Path, pairing: Pairing, problems: Sequence[Sequence[Record]]) -> DirlError:
    """The error for a run whose answers make no pair. problems: all answers to each, however long."""
    if any(pairing.pairs_of(answers, number) for number, answers in enumerate(problems)):
        return DirlError(
            f"every pair of {directory} has an answer that with the prompt holds more than max_tokens="
            f"{pairing.longest}: raise it"
        )
    if pairing.rule == "right_wrong":
        return DirlError(
            f"{directory} has no problem with both right and wrong answers: sample more to each (rl.group_size), or"
            " compare their rewards with dpo.pairing=best_worst"
        )
    return DirlError(
        f"{directory} has no problem with answers of different rewards: sample more to each with rl.group_size"
    )
