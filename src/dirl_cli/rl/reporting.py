"""What a reinforcement step leaves on the disk and on the screen besides its metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dirl_cli.report.progress import StepProgress, due
from dirl_cli.rl.rollout_metrics import answer_table, records
from dirl_cli.rl.rollouts import Answers, any_advantage, why_without_signal
from dirl_cli.rollout.storage import rollout_path, write_rollout

PATIENCE = 5  # steps in a row without a signal after which it is said why


@dataclass
class RolloutReport:
    """Writes each step's answers into `directory`, shows some, and says why there is nothing to learn where that is so.

    directory: None where the answers are on the disk already, and in all processes but one. show_every: steps; 0 for
    never. learns: whether anything is to be learned at all.
    """

    directory: Path | None
    show_every: int
    learns: bool
    progress: StepProgress
    without_signal: int = 0  # steps in a row

    def step(self, step: int, groups: Sequence[Answers], sampled: Sequence[Answers]) -> None:
        """Report step `step` (from 1). groups: those learned from, with their advantages."""
        if self.directory:
            write_rollout(rollout_path(self.directory, step), records(groups, sampled))
        self.without_signal = 0 if any_advantage(groups) else self.without_signal + 1
        if self.without_signal == PATIENCE and self.learns:
            self.progress.say(f"nothing is learned: {why_without_signal(sampled)}")
        if due(step, self.show_every):
            self.progress.console.print(answer_table(groups or sampled, step))
