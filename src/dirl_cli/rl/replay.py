"""Groups of answers read back from an earlier run, checked and where asked rewarded anew."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.reward.functions import is_import_path
from dirl_cli.reward.process import by_step
from dirl_cli.reward.rewards import Answer
from dirl_cli.reward.scoring import RewardComputer
from dirl_cli.rl.batch import steps_of_blocks
from dirl_cli.rl.block_growth import NO_GROWTH, BlockGrowth
from dirl_cli.rl.groups import Decode, Group, group_has_signal, ranked_group, revealed_blocks, with_reward
from dirl_cli.rl.rollout_state import Rollout, RolloutState
from dirl_cli.rollout.storage import Record, read_lines, require_learnable, rollout_files


@dataclass
class ReplayedRollouts:
    """The groups of an earlier run, step by step: those it learned from, and all that a step has on record.

    lm: what is to learn from them. rescorer: rewards them anew; None leaves their rewards as they are. growth: of the
    blocks that they are in.
    """

    files: dict[int, Path]
    lm: DiffusionLM
    rescorer: "Rescorer | None" = None
    growth: BlockGrowth = NO_GROWTH
    state: RolloutState = field(default_factory=RolloutState)
    answers_per_problem = 0

    @property
    def is_new(self) -> bool:
        return self.rescorer is not None

    def collect(self, step: int) -> Rollout:
        """See `RolloutSource.collect`.

        Raises DirlError, with file and line, for an answer that nothing can be learned from.
        """
        lm = self.growth.at(self.lm, step)
        groups: list[Group] = []
        for line, record in read_lines(self.files[step + 1]):
            require_learnable(line, record.trajectory, lm)
            if not self.rescorer:
                require_rewarded(line, record, groups[0][0] if groups else record)
                require_rewards_of_steps(line, record, lm.block_size)
            if not groups or not continues(groups[-1][-1], record):
                groups.append([])
            groups[-1].append(record)

        if self.rescorer:
            groups = self.rescorer.reward(groups, lm.block_size)
            selected = []
            for group in groups:
                # Answers with hints that no group took were never a group.
                has_own = any(not record.trajectory.is_hinted for record in group)
                if has_own and group_has_signal(group, self.rescorer.filter):
                    selected.append(group)
        else:
            selected = [group for group in groups if group[0].learned_from]
        return Rollout(selected, groups, len(selected))

    def epochs(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Rescorer:
    """Rewards answers anew. filter: see `has_signal`. longest: tokens allowed in an answer.

    decode: the text of tokens, where steps are rewarded by it. scorers: of the user's own that problems may name.
    """

    reward_computer: RewardComputer
    filter: str
    longest: int
    decode: Decode | None = None
    scorers: Collection[str] = ()

    def reward(self, groups: Sequence[Group], block_size: int) -> list[Group]:
        """The groups with their new rewards, without answers that have none and groups that have no answer."""
        results = dict(self.reward_computer.compute(self._answers(groups, block_size)))
        rewarded_groups = []
        for i, group in enumerate(groups):
            rewarded = []
            for k, record in enumerate(group):
                result = results.get((i, k))
                if result is not None:
                    rewarded.append(with_reward(record, result))
            if rewarded:
                rewarded_groups.append(ranked_group(rewarded, self.reward_computer.settings, block_size))
        return rewarded_groups

    def _answers(self, groups: Sequence[Group], block_size: int) -> Iterator[tuple[tuple[int, int], Answer]]:
        for i, group in enumerate(groups):
            for k, record in enumerate(group):
                problem, trajectory, text = record.problem, record.trajectory, record.completion
                if is_import_path(problem.verifier) and problem.verifier not in self.scorers:
                    raise DirlError(
                        f"problem {problem.id} names the code {problem.verifier}: where you trust it, let it run with"
                        f" data.scorers=[{problem.verifier}]"
                    )
                blocks = revealed_blocks(self.decode, trajectory, block_size)
                yield (i, k), Answer.of(problem, trajectory, text, self.longest, block_size, blocks)


def require_rewarded(line: str, record: Record, first: Record) -> None:
    """Raises DirlError for an answer without a reward, or with others than the `first` of its step.

    line: the file and the number of the line that holds the record.
    """
    if record.reward is None:
        raise DirlError(f"{line} has no reward: reward it anew with rl.rescore=true")
    if record.parts.keys() != first.parts.keys():
        names = f"{' + '.join(record.parts) or 'none'} and {' + '.join(first.parts) or 'none'}"
        raise DirlError(f"{line} has other rewards than the first line ({names}): reward it anew with rl.rescore=true")


def require_rewards_of_steps(line: str, record: Record, block_size: int) -> None:
    """Raises DirlError for an answer on record whose process rewards are neither of its steps nor of its blocks.

    line: the file and the number of the line that holds the record.
    """
    try:
        if record.process:
            by_step(record.process, steps_of_blocks(record.trajectory, block_size))
    except ValueError as error:
        raise DirlError(f"{line}: process holds {error}; give as many as there are of either") from error


def rollouts_of(directory: Path, steps: int) -> dict[int, Path]:
    """The files of a run's rollouts by step. Raises DirlError if there is none for one of the steps."""
    files = rollout_files(directory)
    missing = [step for step in range(1, steps + 1) if step not in files]
    if missing:
        raise DirlError(f"{directory} holds no rollout of step {missing[0]}: replay fewer with steps={missing[0] - 1}")
    return files


def continues(last: Record, record: Record) -> bool:
    """Whether a record belongs to the group of the one before it; a problem may be drawn twice in a step.

    What nothing was learned from was in no group with hinted answers and others.
    """
    if record.learned_from != last.learned_from:
        return False
    if not record.learned_from and record.trajectory.is_hinted != last.trajectory.is_hinted:
        return False
    return record.problem == last.problem and record.sample > last.sample
