"""Sampled answers as demonstrations: of rollouts or of `dirl generate`, the right ones or the fastest of them kept."""

import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from random import Random
from typing import Annotated, NoReturn

from dirl_cli.data.chat import answer_text
from dirl_cli.data.tokens import TokenTable
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.ranges import Range, Seed, ShareOrCount
from dirl_cli.reward.functions import is_import_path
from dirl_cli.reward.grading import Credit
from dirl_cli.rollout.storage import Record, distinct, problem_key, require_learnable
from dirl_cli.sft.answer_credits import Grade
from dirl_cli.sft.answer_files import Naming, read_records
from dirl_cli.text import counted
from dirl_cli.types import HELD, Problem, Trajectory

AnswerGroup = list[tuple[str, Record]]  # the answers to one problem, each with its file and line


@dataclass(frozen=True)
class AnswerTables:
    """Kept answers as tokens, to learn from and to measure on; remarks: lines on which they are."""

    training: TokenTable
    held_out: TokenTable
    remarks: list[str]


@dataclass(frozen=True)
class SampledAnswers:
    """The answers of rollouts, or of `dirl generate`, that are worth learning from.

    path: a run's directory, its rollouts/, a directory with what `dirl generate` wrote, or a file of either.
    least_reward: of an answer that is kept, its credit where it has no reward; None keeps the correct ones.
    fastest: of these, how many to each problem are kept: those with the fewest denoising forwards, as their reveal
    steps tell; a share below 1 or a number; None keeps all. held_out: problems to validate on, chosen by `seed`.
    columns: how the prompts of `dirl generate` call theirs, by our names. verifier, scorers: as in `name_verifiers`.
    """

    path: str
    name: str = ""
    columns: dict[str, str] | None = None
    least_reward: Annotated[float, Range(infinite=True)] | None = None
    fastest: Annotated[float, Range(above=0, whole_from_one=True)] | None = None
    held_out: ShareOrCount = 0
    seed: Seed = 0
    verifier: str | None = None
    scorers: list[str] = field(default_factory=list)

    def demonstrations(self) -> NoReturn:
        """Raises DirlError: they are no texts."""
        raise DirlError(
            f"the answers of data={self.path} are sampled tokens, from which `dirl sft` learns: give a file of texts"
        )

    validation = demonstrations

    def training_problems(self) -> list[Problem]:
        """What the answers to learn from are answers to."""
        groups, _ = self._splits
        return self._problems(groups)

    def problems(self) -> list[Problem]:
        """What the answers held out are answers to."""
        _, held_out = self._splits
        return self._problems(held_out)

    def questions(self) -> list[tuple[Problem, list[int]]]:
        """As `problems`, those that answers can be graded to, each with the prompt that its answers were sampled of."""
        _, held_out = self._splits
        prompts = [group[0][1].trajectory.prompt_ids for group in held_out]
        pairs = zip(self._problems(held_out), prompts, strict=True)
        return [(problem, prompt) for problem, prompt in pairs if problem.is_gradable]

    def remarks(self) -> list[str]:
        return []

    def require_blocks(self, sizes: Sequence[int]) -> None:
        """Raises DirlError for an answer whose trace says nothing of blocks of some size, since its own are larger.

        sizes: of the blocks to learn in, the model's last. In a smaller block than it was sampled in a state would show
        all of the blocks before, of which the sampler still had some masked.
        """
        for location, record in chain.from_iterable(chain.from_iterable(self._splits)):
            sampled_in = record.trajectory.block_size or sizes[-1]
            for size in sizes:
                if size % sampled_in:
                    raise DirlError(
                        f"{location} was sampled in blocks of {sampled_in}, and masking=trace would follow it in blocks"
                        f" of {size}: begin with annealing.block_sizes and end with a model.block_size that"
                        f" {sampled_in} divides, or give another masking"
                    )

    def tables(self, lm: DiffusionLM, grade: Grade, longest: int) -> AnswerTables:
        """The answers that are kept, as they were sampled. longest: tokens of a prompt and answer.

        Raises DirlError, with file and line, for an answer that `lm` cannot learn from.
        """
        groups, held_out = self._splits
        for group in (*groups, *held_out):
            require_answers_of(group, lm)

        left_out: Counter[str] = Counter()
        hinted = sum(record.trajectory.is_hinted for _, record in self._answers)
        if hinted:
            left_out["were given hints"] = hinted
        graded, given_up = self._graded([*groups, *held_out], grade)
        kept = [self._kept(group, lm, longest, given_up, left_out) for group in graded]
        training = [record.trajectory for group in kept[: len(groups)] for record in group]
        unseen = [record.trajectory for group in kept[len(groups) :] for record in group]

        total = hinted + sum(map(len, graded))
        problems = counted(sum(map(bool, kept)), "problem")
        summary = f"{len(training):,} training and {len(unseen):,} held-out answers to {problems}"
        reasons = [f"{n:,} left out that {why}" for why, n in left_out.items()]
        remarks = ["; ".join([f"{summary}, from {counted(total, 'answer')} in {self.path}", *reasons])]
        if training:
            tokens = sum(len(answer.token_ids) for answer in training)
            forwards = sum(forwards_of(answer, lm) for answer in training)
            remarks.append(f"  they were sampled at {tokens / forwards:.2f} tokens per denoising forward")
        return AnswerTables(token_table(training, lm), token_table(unseen, lm), remarks)

    def _graded(self, groups: Sequence[AnswerGroup], grade: Grade) -> tuple[list[AnswerGroup], set[str]]:
        """The answers, rewarded by their credit where they had no reward; and where those are that were given up on.

        Nothing is graded where all are kept. Raises DirlError where that would run code that the config does not name.
        """
        waiting = {}  # by file and line
        credits: dict[str, Credit] = {}
        for location, record in chain.from_iterable(groups):
            if self.least_reward == -math.inf or record.reward is not None or not record.problem.is_gradable:
                continue
            if record.trajectory.stop_reason == "stop":
                self._require_trusted(record.problem)
                waiting[location] = (record.problem, record.completion)
            else:
                credits[location] = 0.0
        credits |= zip(waiting, grade(list(waiting.values())), strict=True)

        graded = []
        for group in groups:
            graded.append([(location, rewarded_by_credit(record, credits.get(location))) for location, record in group])
        return graded, {location for location, credit in credits.items() if credit is None}

    def _kept(
        self, group: AnswerGroup, lm: DiffusionLM, longest: int, given_up: Container[str], left_out: Counter[str]
    ) -> list[Record]:
        """The answers to a problem that are learned from, in order; the others are counted by why not."""
        fitting = []
        for location, record in group:
            reason = self._reason_against(record, location in given_up)
            if not reason and len(record.trajectory.prompt_ids) + len(record.trajectory.token_ids) > longest:
                reason = f"with the prompt hold more than {longest:,} tokens"
            if reason:
                left_out[reason] += 1
            else:
                fitting.append(record)

        fastest = self._fastest(fitting, lm)
        if len(fastest) < len(fitting):
            left_out["others to the problem are faster than"] += len(fitting) - len(fastest)
        return fastest

    def _reason_against(self, record: Record, is_given_up: bool) -> str | None:
        """Why an answer is not worth learning from, in words; None where it is. is_given_up: by who graded it."""
        if self.least_reward == -math.inf:
            return None
        if self.least_reward is None and record.correct:
            return None
        if is_given_up:
            return "took too long to grade"
        if record.reward is None:
            return "have nothing to be graded by"
        if self.least_reward is None:
            return "are not correct"
        return f"have a reward below {self.least_reward:g}" if record.reward < self.least_reward else None

    def _fastest(self, records: list[Record], lm: DiffusionLM) -> list[Record]:
        """Those with the fewest forwards, the first of equals, in the order in which they came."""
        if self.fastest is None:
            return records
        number = int(self.fastest) if self.fastest >= 1 else math.ceil(self.fastest * len(records))
        ranked = sorted(range(len(records)), key=lambda i: forwards_of(records[i].trajectory, lm))
        return [records[i] for i in sorted(ranked[:number])]

    def _problems(self, groups: Sequence[AnswerGroup]) -> list[Problem]:
        """What the groups answer. Raises DirlError where one names code that the config does not."""
        problems = [group[0][1].problem for group in groups]
        for problem in problems:
            self._require_trusted(problem)
        return problems

    def _require_trusted(self, problem: Problem) -> None:
        """Raises DirlError where grading an answer to the problem would run code that the config does not name."""
        if is_import_path(problem.verifier) and problem.verifier not in (*self.scorers, self.verifier):
            raise DirlError(
                f"problem {problem.id} of {self.path} names the code {problem.verifier}: where you trust it, let it"
                f" run with data.scorers=[{problem.verifier}]"
            )

    @cached_property
    def _splits(self) -> tuple[list[AnswerGroup], list[AnswerGroup]]:
        """The answers by problem, to learn from and held out, in the order in which problems first came up."""
        by_problem: dict[tuple[str, tuple[int, ...]], AnswerGroup] = {}
        for location, record in distinct(self._answers):
            by_problem.setdefault(problem_key(record), []).append((location, record))
        groups = list(by_problem.values())
        if not groups:
            raise DirlError(
                f"{self.path} holds no answers without hints: sample some with `dirl rl rl.rollout_only=true` or"
                " `dirl generate input=FILE`"
            )
        size = int(self.held_out)
        if self.held_out < 1:
            size = round(self.held_out * len(groups))
        if not 0 <= size < len(groups):
            raise DirlError(
                f"{self.path} has answers to {counted(len(groups), 'problem')}, so {size} cannot be held out: lower"
                " data.held_out"
            )

        # Whole problems, so that none is both learned from and measured on.
        unseen = set(Random(self.seed).sample(range(len(groups)), size))
        training = [group for i, group in enumerate(groups) if i not in unseen]
        return training, [groups[i] for i in sorted(unseen)]

    @cached_property
    def _answers(self) -> list[tuple[str, Record]]:
        """All that the files hold, each with its file and line."""
        naming = Naming(self.name, self.columns or {}, self.verifier, self.scorers)
        return read_records(Path(self.path), naming)


def require_answers_of(group: AnswerGroup, lm: DiffusionLM) -> None:
    """Raises DirlError, with file and line, where `lm` cannot have given the answers to a problem.

    They may be in other blocks than its own. That its tokenizer reads them as they were sampled is checked of the first
    that says anything.
    """
    for location, record in group:
        answer = record.trajectory
        require_learnable(location, answer, replace(lm, block_size=answer.block_size or lm.block_size))
    saying = [(location, record) for location, record in group if record.trajectory.completion_ids]
    if not lm.tokenizer or not saying:
        return
    location, record = saying[0]
    if answer_text(lm.tokenizer, record.trajectory.completion_ids) != record.completion:
        raise DirlError(
            f"{location}: the model's tokenizer reads its tokens otherwise than they were sampled: give answers of a"
            " model with the same tokens"
        )


def rewarded_by_credit(record: Record, credit: Credit) -> Record:
    """The record, rewarded by a credit; as it is where there is none."""
    return record if credit is None else replace(record, reward=credit, correct=credit == 1)


def forwards_of(answer: Trajectory, lm: DiffusionLM) -> int:
    """The denoising forwards that an answer took, as its reveal steps tell."""
    return max(answer.revealed_at(answer.block_size or lm.block_size))


def token_table(answers: Sequence[Trajectory], lm: DiffusionLM) -> TokenTable:
    """Answers as demonstrations: all their tokens, the tail included, and the forwards that revealed them."""
    encoded = []
    revealed_at = []
    for answer in answers:
        given = len(answer.prompt_ids)
        encoded.append(([*answer.prompt_ids, *answer.token_ids], [False] * given + [True] * len(answer.token_ids)))
        order = answer.revealed_at(answer.block_size or lm.block_size)
        revealed_at.append([HELD] * given + order)
    return TokenTable.of(encoded, revealed_at)
