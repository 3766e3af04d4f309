"""Sampled answers as demonstrations: of rollouts or of `dirl generate`, the right ones or the fastest of them kept."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Annotated, Any, NoReturn

from dirl_cli.data.chat import answer_text
from dirl_cli.data.rows import Row
from dirl_cli.data.tokens import TokenTable
from dirl_cli.data.verified_rows import is_verifiable, name_verifiers, verified_problem, verified_question
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.ranges import Range, Seed, ShareOrCount
from dirl_cli.reward.functions import is_import_path
from dirl_cli.reward.grading import Grader
from dirl_cli.rollout.storage import (
    Record,
    distinct,
    integer,
    problem_key,
    read_lines,
    require_learnable,
    rollout_files,
    trajectory_from_json,
    value_of_type,
)
from dirl_cli.text import counted
from dirl_cli.types import HELD, Problem, Trajectory

COMPLETIONS = "completions.jsonl"  # what `dirl generate` leaves
SAMPLED = {  # the columns of its lines that are none of the prompt's
    "index",
    "sample",
    "text",
    "prompt_ids",
    "token_ids",
    "reveal_step",
    "logprobs",
    "stop_reason",
    "denoise_forwards",
    "forwards",
    "stop_token_ids",
    "block_size",
}

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
    verifier, scorers: as in `name_verifiers`.
    """

    path: str
    name: str = ""
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

    def remarks(self) -> list[str]:
        return []

    def tables(self, lm: DiffusionLM, grader: Grader, longest: int) -> AnswerTables:
        """The answers that are kept, as they were sampled. longest: tokens of a prompt and answer.

        Raises DirlError, with file and line, for an answer that `lm` cannot learn from.
        """
        left_out: Counter[str] = Counter()
        groups, held_out = self._splits
        kept = [self._kept(group, lm, grader, longest, left_out) for group in (*groups, *held_out)]
        training = [record.trajectory for group in kept[: len(groups)] for record in group]
        unseen = [record.trajectory for group in kept[len(groups) :] for record in group]

        total = sum(map(len, [*groups, *held_out]))
        problems = counted(sum(map(bool, kept)), "problem")
        summary = f"{len(training):,} training and {len(unseen):,} held-out answers to {problems}"
        reasons = [f"{n:,} left out that {why}" for why, n in left_out.items()]
        remarks = ["; ".join([f"{summary}, from {counted(total, 'answer')} in {self.path}", *reasons])]
        if training:
            tokens = sum(len(answer.token_ids) for answer in training)
            forwards = sum(forwards_of(answer, lm) for answer in training)
            remarks.append(f"  they were sampled at {tokens / forwards:.2f} tokens per denoising forward")
        return AnswerTables(token_table(training, lm), token_table(unseen, lm), remarks)

    def _kept(
        self, group: AnswerGroup, lm: DiffusionLM, grader: Grader, longest: int, left_out: Counter[str]
    ) -> list[Record]:
        """The answers to a problem that are learned from, in order; the others are counted by why not."""
        for location, record in group:
            answer = record.trajectory
            require_learnable(location, answer, replace(lm, block_size=answer.block_size or lm.block_size))
        require_same_words(*group[0], lm)

        ungraded = {}
        for i, (_, record) in enumerate(group):
            if record.reward is None and record.problem.is_gradable:
                ungraded[i] = (i, record.problem, record.completion)
        credits = dict(grader.grade(ungraded.values()))
        right = []
        for i, (_, record) in enumerate(group):
            if i in credits:
                credit = credits[i] if record.trajectory.stop_reason == "stop" else 0.0
                record = replace(record, reward=credit, correct=credit == 1)
            if self._is_worth_learning(record):
                right.append(record)

        fitting = [one for one in right if len(one.trajectory.prompt_ids) + len(one.trajectory.token_ids) <= longest]
        fastest = self._fastest(fitting, lm)
        why = "are not correct" if self.least_reward is None else f"have a reward below {self.least_reward:g}"
        for reason, number in (
            (why, len(group) - len(right)),
            (f"with the prompt hold more than {longest:,} tokens", len(right) - len(fitting)),
            ("others to the problem are faster than", len(fitting) - len(fastest)),
        ):
            if number:
                left_out[reason] += number
        return fastest

    def _is_worth_learning(self, record: Record) -> bool:
        if self.least_reward is None:
            return record.correct
        if self.least_reward == -math.inf:
            return True
        return record.reward is not None and record.reward >= self.least_reward

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
            if is_import_path(problem.verifier) and problem.verifier not in (*self.scorers, self.verifier):
                raise DirlError(
                    f"problem {problem.id} of {self.path} names the code {problem.verifier}: where you trust it, let it"
                    f" run with data.scorers=[{problem.verifier}]"
                )
        return problems

    @cached_property
    def _splits(self) -> tuple[list[AnswerGroup], list[AnswerGroup]]:
        """The answers by problem, to learn from and held out, in the order in which problems first came up."""
        by_problem: dict[tuple[str, tuple[int, ...]], AnswerGroup] = {}
        for location, record in distinct(self._answers()):
            by_problem.setdefault(problem_key(record), []).append((location, record))
        groups = list(by_problem.values())
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

    def _answers(self) -> Iterator[tuple[str, Record]]:
        for file in answer_files(Path(self.path)):
            yield from read_lines(file, self._record(file))

    def _record(self, file: Path) -> Callable[[Any], Record] | None:
        """What makes a record of a line; None where lines are those of rollouts."""
        if is_rollout(file):
            return None
        return lambda line: self._completion(file, line)

    def _completion(self, file: Path, line: Any) -> Record:
        """A line that `dirl generate` wrote, graded by nobody yet. Raises as `from_json` does for anything else."""
        if not isinstance(line, dict):
            raise TypeError("a completion is an object")
        number = integer(line, "index")
        row = Row(f"{file} index {number}", {name: line[name] for name in line if name not in SAMPLED})
        [row] = name_verifiers([row], self.verifier, self.scorers, "data.columns=")
        default_id = f"{self.name}-{number}"
        if is_verifiable(row):
            problem = verified_problem(verified_question(row, "data.columns="), default_id)
        else:
            problem = Problem(default_id, str(row.fields.get("question", "")), "")
        return Record(
            problem=problem,
            sample=integer(line, "sample"),
            completion=value_of_type(line, "text", str),
            trajectory=trajectory_from_json({"weights_version": 0, **line}),
        )


def answer_files(path: Path) -> list[Path]:
    """The files of answers in a directory, in order, or the file itself. Raises DirlError where there is none."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise DirlError(
            f"{path} is not there: sample answers with `dirl rl rl.rollout_only=true out={path}` or `dirl generate"
            f" input=FILE out={path}` first"
        )
    if (path / COMPLETIONS).exists():
        return [path / COMPLETIONS]
    return list(rollout_files(path).values())


def is_rollout(file: Path) -> bool:
    """Whether a file's first line is one of rollouts, which alone have `parts` of a reward."""
    with file.open("rb") as lines:
        return b'"parts":' in next(lines, b'"parts":')


def require_same_words(location: str, record: Record, lm: DiffusionLM) -> None:
    """Raises DirlError where an answer's tokens say something else to this model's tokenizer than was sampled."""
    if lm.tokenizer and answer_text(lm.tokenizer, record.trajectory.completion_ids) != record.completion:
        raise DirlError(
            f"{location}: the model's tokenizer reads its tokens otherwise than they were sampled: give answers of a"
            " model with the same tokens"
        )


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
