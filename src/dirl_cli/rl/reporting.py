"""What a reinforcement step leaves on the disk and on the screen besides its metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from dirl_cli.report.progress import StepProgress, due
from dirl_cli.rl.groups import Group
from dirl_cli.rl.rollout_metrics import answer_table, records
from dirl_cli.rollout.storage import rollout_path, write_rollout
from dirl_cli.training.background_write import BackgroundWrite

REMEDIES = (
    "give easier problems or a model that is right at times, more decoding.max_new_tokens,"
    " or reference answers in the form that is asked for (dry_run=true shows them)"
)
PATIENCE = 5  # steps in a row without a signal after which it is said why


@dataclass
class RolloutReport:
    """Writes each step's answers into `directory`, shows some, and says why there is nothing to learn where that is so.

    A thread writes them while the policy is updated.
    directory: None where the answers are on the disk already, and in all processes but one. show_every: steps; 0 for
    never. learns: whether anything is to be learned at all. compress: whether the thread compresses them.
    """

    directory: Path | None
    show_every: int
    learns: bool
    progress: StepProgress
    compress: bool = False
    without_signal: int = 0  # steps in a row
    background_write: BackgroundWrite = field(default_factory=lambda: BackgroundWrite("rollout"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.background_write.__exit__(kind, error, trace)

    def write(self, step: int, groups: Sequence[Group], sampled: Sequence[Group]) -> None:
        """Write and show step `step` (from 1). groups: those learned from, with their advantages."""
        if self.directory:
            path = rollout_path(self.directory, step, self.compress)
            self.background_write.start(write_rollout, path, records(groups, sampled))
        self.without_signal = 0 if any_advantage(groups) else self.without_signal + 1
        if self.without_signal == PATIENCE and self.learns:
            self.progress.print_line(f"nothing is learned: {why_without_signal(sampled)}")
        if due(step, self.show_every):
            self.progress.console.print(answer_table(groups or sampled, step))

    def wait(self) -> None:
        """Wait until the last step's answers are on the disk. Raises DirlError where they could not be written."""
        self.background_write.wait()


def any_advantage(groups: Sequence[Group]) -> bool:
    """Whether any answer is worth more or less than the others to its problem."""
    return any(record.advantage for record in chain.from_iterable(groups))


def why_without_signal(groups: Sequence[Group]) -> str:
    """Why there is nothing to learn from these groups, and what to change."""
    answers = list(chain.from_iterable(groups))
    if not answers:
        return "no answer has a reward: correct what reward.weights names"
    if any(rewards_differ(group) for group in groups):
        return "no group has right and wrong answers, but rewards differ in some: rl.filter=reward keeps those"
    if all(record.correct for record in answers):
        return "all answers are right: give harder problems"
    if not any(record.correct for record in answers):
        return f"all answers are wrong; {REMEDIES}"
    return "the answers to each problem are all right or all wrong: raise rl.group_size or decoding.temperature"


def rewards_differ(group: Group) -> bool:
    return len({record.reward for record in group}) > 1
