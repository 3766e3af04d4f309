"""Groups of answers with what they earned, and where they come from: sampled, with dynamic sampling."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dirl_cli.data.chat import answer_text
from dirl_cli.data.order import MixtureOrder, epochs
from dirl_cli.diffusion.sampling import request_key
from dirl_cli.distributed import split_by_cost
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.reward.process import RevealedBlock
from dirl_cli.reward.ranking import Contender
from dirl_cli.reward.rewards import Answer
from dirl_cli.reward.scoring import RewardComputer, RewardResult, RewardSettings
from dirl_cli.rl.advantages import AdvantageEstimator, GroupRewards, has_signal
from dirl_cli.rl.batch import steps_of_tokens
from dirl_cli.rl.block_growth import NO_GROWTH, BlockGrowth
from dirl_cli.rl.curriculum import EVERYTHING, Curriculum
from dirl_cli.rl.hints import NO_HINTS, Hints, is_all_wrong
from dirl_cli.rollout.arrays import with_arrays
from dirl_cli.rollout.sampler import Hint, Sampler
from dirl_cli.rollout.storage import Record, from_json, to_json
from dirl_cli.types import HELD, Decoding, Problem, Trajectory

Group = list[Record]  # the group of one problem: the answers to it, with what they earned
Indexed = tuple[int, Record]  # an answer, and where in the endless order its problem stands
Decode = Callable[[list[int]], str]
HINTING, TAKING_IN = 1, 2  # at the end of a seed's numbers: what it is for


@dataclass
class RolloutState:
    """How far into the endless order of problems a run is, which its checkpoints keep.

    drawn: problems drawn so far. surplus: groups left over for the next step. prefetched: the answers to the next
    step's first problems, where they are sampled while the policy is updated. rests_until: see curriculum.py.
    """

    drawn: int = 0
    surplus: list[Group] = field(default_factory=list)
    prefetched: list[Group] = field(default_factory=list)
    rests_until: dict[int, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "drawn": self.drawn,
            "surplus": groups_to_json(self.surplus),
            "prefetched": groups_to_json(self.prefetched),
            "rests_until": {str(problem): index for problem, index in self.rests_until.items()},
        }

    @staticmethod
    def from_json(saved: dict[str, Any]) -> "RolloutState":
        prefetched = saved["ahead"] if "ahead" in saved else saved["prefetched"]  # "ahead" in earlier versions
        rests_until = {int(problem): index for problem, index in saved.get("rests_until", {}).items()}
        surplus = groups_from_json(saved["surplus"])
        return RolloutState(saved["drawn"], surplus, groups_from_json(prefetched), rests_until)


def groups_to_json(groups: Sequence[Group]) -> list[list[dict[str, Any]]]:
    return [list(map(to_json, group)) for group in groups]


def groups_from_json(groups: list[list[dict[str, Any]]]) -> list[Group]:
    return [list(map(from_json, group)) for group in groups]


@dataclass(frozen=True)
class Rollout:
    """What a step has to learn from.

    groups: those it learns from, what earlier steps left over first. sampled: all that were sampled for it, as they
    were before hints. num_with_signal: how many of them passed the filter, be it for a later step. hinted: what was
    sampled again with hints, a group for each that was all wrong; None where that is not done.
    """

    groups: list[Group]
    sampled: list[Group]
    num_with_signal: int
    hinted: list[Group] | None = None


class RolloutSource(Protocol):
    """Where a step's groups come from."""

    state: RolloutState

    @property
    def answers_per_problem(self) -> int:
        """How many there should be; 0 where that is not known."""
        ...

    @property
    def is_new(self) -> bool:
        """Whether the answers or their rewards are on no disk yet."""
        ...

    def collect(self, step: int) -> Rollout:
        """The rollout of step `step` (from 0); moves `state` on.

        Where it is interrupted, `state` is what it was.
        """
        ...

    def epochs(self) -> dict[str, float]:
        """How often each source of problems has been gone through, as metrics."""
        ...


@dataclass
class SampledRollouts:
    """Groups sampled from the policy: problems are drawn in their order, answered and rewarded until enough pass.

    pool, prompts: the problems and their prompts. sources: the names of what they come from. filter: see `has_signal`.
    max_rounds: draws in which to find a step's problems. seed: of the answers. prefetches: whether the next step's
    answers are sampled while the policy is updated. curriculum: which problems are passed over. decode: the text of
    tokens, where steps are rewarded by it. hints: for groups that are all wrong, from the problems' `solutions`, in
    tokens. growth: of the blocks to sample in.
    """

    pool: Sequence[Problem]
    prompts: Sequence[list[int]]
    lm: DiffusionLM
    sampler: Sampler
    reward_computer: RewardComputer
    decoding: Decoding
    accelerator: Accelerator
    problems_per_step: int
    group_size: int
    filter: str
    max_rounds: int
    order: MixtureOrder
    seed: int
    sources: Sequence[str] = ("",)
    prefetches: bool = False
    curriculum: Curriculum = EVERYTHING
    decode: Decode | None = None
    hints: Hints = NO_HINTS
    solutions: Sequence[Sequence[int]] = ()
    growth: BlockGrowth = NO_GROWTH
    state: RolloutState = field(default_factory=RolloutState)
    lengths: dict[int, float] = field(default_factory=dict)  # by problem: the mean of its last answers, in tokens
    is_new = True

    @property
    def answers_per_problem(self) -> int:
        return self.group_size

    def collect(self, step: int) -> Rollout:
        """See `RolloutSource.collect`; groups left over from earlier steps come first."""
        drawn = self.state.drawn
        rests_until = dict(self.state.rests_until)
        prefetched = self.state.prefetched
        selected = self.surplus(step)
        sampled: list[Group] = []
        hinted: list[Group] = []
        num_with_signal = 0

        # Dynamic sampling (DAPO): groups without a signal make way for other problems, up to max_rounds times.
        for round_number in range(self.max_rounds):
            if len(selected) >= self.problems_per_step:
                break
            indices, drawn = self.next_indices(drawn, rests_until)
            groups = prefetched or self.sample(indices, step, round_number)
            prefetched = []
            rests_until |= self.curriculum.rests(self.order, indices, [pass_rate(group) for group in groups])

            sampled += groups
            if self.hints.most:
                groups, sampled_again = self.take_in_hinted(groups, indices, step, round_number)
                hinted += sampled_again
            passing = [group for group in groups if group_has_signal(group, self.filter)]
            selected += passing
            num_with_signal += len(passing)

        # Set at the end alone: a rollout that is interrupted has not happened.
        resting = {problem: index for problem, index in rests_until.items() if index > drawn}
        self.state = RolloutState(drawn, selected[self.problems_per_step :], prefetched, resting)
        with_hints = hinted if self.hints.most else None
        return Rollout(selected[: self.problems_per_step], sampled, num_with_signal, with_hints)

    def surplus(self, step: int) -> list[Group]:
        """The groups left over that step `step` can learn from: those in blocks of its size."""
        block_size = self.growth.at(self.lm, step).block_size
        fitting = []
        for group in self.state.surplus:
            if all(record.trajectory.block_size in (None, block_size) for record in group):
                fitting.append(group)
        return fitting

    def epochs(self) -> dict[str, float]:
        metrics = epochs(self.order, self.sources, self.state.drawn)
        if self.curriculum != EVERYTHING:
            metrics["resting"] = len(self.state.rests_until)
        return metrics

    def next_indices(self, drawn: int, rests_until: Mapping[int, int]) -> tuple[list[int], int]:
        """The next problems of the endless order, from `drawn` on, and where it goes on."""
        return self.curriculum.indices(self.order, drawn, self.problems_per_step, rests_until)

    def take_in_hinted(
        self, groups: Sequence[Group], indices: Sequence[int], step: int, round_number: int
    ) -> tuple[list[Group], list[Group]]:
        """The groups, those that are all wrong with right answers sampled with hints; and all that were sampled so."""
        all_wrong = [index for index, group in zip(indices, groups, strict=True) if is_all_wrong(group)]
        if not all_wrong:
            return list(groups), []
        sampled_again = self.sample(all_wrong, step, round_number, with_hints=True)
        by_index = dict(zip(all_wrong, sampled_again, strict=True))

        improved = []
        for index, group in zip(indices, groups, strict=True):
            if index in by_index:
                generator = seeded(self.seed, step, round_number, index, TAKING_IN)
                group = self.ranked(self.hints.take_in(group, by_index[index], generator))
            improved.append(group)
        return improved, sampled_again

    def sample(self, indices: Sequence[int], step: int, round_number: int, with_hints: bool = False) -> list[Group]:
        """The answers to some problems of the endless order, of which every process samples its share."""
        return self.gather(list(self.sample_share(indices, step, round_number, with_hints)), indices)

    def sample_share(
        self, indices: Sequence[int], step: int, round_number: int, with_hints: bool = False
    ) -> Iterator[Indexed]:
        """The answers to this process's share of the problems; all shares take about as long."""
        costs = [self.cost(self.order[index]) for index in indices]
        shares = split_by_cost(costs, self.accelerator.num_processes)
        own_indices = [indices[i] for i in shares[self.accelerator.process_index]]
        self.sampler.set_block_size(self.growth.at(self.lm, step).block_size)
        with self.accelerator.autocast():
            yield from self.answers(own_indices, step, round_number, with_hints)

    def gather(self, own_answers: list[Indexed], indices: Sequence[int]) -> list[Group]:
        """Every process's answers as groups, in the order of their problems and samples."""
        answers = own_answers
        if self.accelerator.num_processes > 1:
            own_indices = [index for index, _ in own_answers]
            records = with_arrays(record for _, record in own_answers)
            answers = gather_object(list(zip(own_indices, records, strict=True)))
        groups: dict[int, Group] = {index: [] for index in indices}
        for index, record in answers:
            groups[index].append(record)

        for index, group in groups.items():
            if group:
                self.lengths[self.order[index]] = fmean(len(record.trajectory.token_ids) for record in group)
        in_order = [sorted(group, key=lambda record: record.sample) for group in groups.values()]
        return [self.ranked(group) for group in in_order]

    def ranked(self, group: Group) -> Group:
        """The group with the rewards that compare its answers."""
        return ranked_group(group, self.reward_computer.settings, self.sampler.lm.block_size)

    def cost(self, problem: int) -> float:
        """Tokens of a prompt and an answer to it, as long as its last or, until it has one, as all problems'."""
        usual = fmean(self.lengths.values()) if self.lengths else 0.0
        return len(self.prompts[problem]) + self.lengths.get(problem, usual)

    def answers(self, indices: Sequence[int], step: int, round_number: int, with_hints: bool) -> Iterator[Indexed]:
        """Each rewarded answer to the problems at these indices of the endless order, as it is ready."""
        # With the index, step and round make the seed, since a problem may come up again.
        purpose = [HINTING] if with_hints else []
        seeds = [request_key(self.seed, [step, round_number, index, *purpose], 0) for index in indices]
        hints = [self.draw_hints(index, step, round_number) for index in indices] if with_hints else None
        problems = [self.pool[self.order[index]] for index in indices]
        prompts = [self.prompts[self.order[index]] for index in indices]
        tokenizer = self.lm.require_tokenizer()
        waiting: dict[tuple[int, int], Record] = {}  # for their rewards

        def sampled_answers() -> Iterator[tuple[tuple[int, int], Answer]]:
            stream = self.sampler.stream(prompts, self.group_size, self.decoding, seeds=seeds, hints=hints)
            for i, sample, trajectory in stream:
                text = answer_text(tokenizer, trajectory.completion_ids)
                waiting[i, sample] = Record(problems[i], sample, text, trajectory)
                longest, block_size = self.decoding.max_new_tokens, self.sampler.lm.block_size
                blocks = revealed_blocks(self.decode, trajectory, block_size)
                yield (i, sample), Answer.of(problems[i], trajectory, text, longest, block_size, blocks)

        # `compute` draws from the answers, so that sampling goes on while earlier answers are graded.
        for key, result in self.reward_computer.compute(sampled_answers()):
            record = waiting.pop(key)
            if result is not None:
                yield indices[key[0]], with_reward(record, result)

    def draw_hints(self, index: int, step: int, round_number: int) -> list[Hint]:
        """A hint for each answer to the problem at an index of the endless order."""
        problem = self.order[index]
        room = self.lm.longest_prompt + 1 - len(self.prompts[problem])
        longest = min(self.decoding.max_new_tokens, room)
        generator = seeded(self.seed, step, round_number, index, HINTING)
        return [self.hints.hint(self.solutions[problem], longest, generator) for _ in range(self.group_size)]


def revealed_blocks(decode: Decode | None, trajectory: Trajectory, block_size: int) -> tuple[RevealedBlock, ...]:
    """An answer's blocks with the texts that their steps revealed; none without `decode`."""
    if decode is None:
        return ()
    by_block: dict[int, dict[int, list[int]]] = {}  # token ids by block and step
    for token, (block, step) in zip(trajectory.token_ids, steps_of_tokens(trajectory, block_size), strict=True):
        by_block.setdefault(block, {}).setdefault(step, []).append(token)

    first = len(trajectory.prompt_ids)
    blocks = []
    for block, steps in by_block.items():
        own = slice(max(block * block_size - first, 0), (block + 1) * block_size - first)
        texts = [tuple(decode([token]) for token in steps[step]) for step in sorted(steps) if step != HELD]
        blocks.append(RevealedBlock(decode(trajectory.token_ids[own]), tuple(texts)))
    return tuple(blocks)


def group_has_signal(group: Group, rule: str) -> bool:
    """Whether a group is worth learning from; see `has_signal`."""
    rewards = [record.reward or 0.0 for record in group]
    return len(group) > 0 and has_signal(rewards, [record.correct for record in group], rule)


def pass_rate(group: Group) -> float | None:
    """The share of a group's answers that are correct; None where none is left."""
    return fmean(record.correct for record in group) if group else None


def with_reward(record: Record, result: RewardResult) -> Record:
    return replace(record, reward=result.total, parts=result.parts, process=result.process, correct=result.correct)


def ranked_group(group: Group, settings: RewardSettings, block_size: int) -> Group:
    """The group with the rewards that compare its answers, where there are any.

    An answer's forwards are as its reveal steps tell. block_size: that they were sampled in where they do not say.
    """
    if not settings.ranks:
        return group
    contenders = []
    for record in group:
        answer = record.trajectory
        forwards = max(answer.revealed_at(answer.block_size or block_size))
        contenders.append(Contender(record.correct, len(answer.completion_ids), forwards, answer.is_hinted))
    rewards = settings.ranked(contenders, [record.parts for record in group])
    return [replace(record, reward=reward, parts=parts) for record, (reward, parts) in zip(group, rewards, strict=True)]


def add_advantages(groups: Sequence[Group], estimator: AdvantageEstimator) -> list[Group]:
    """The groups with each answer's advantage over the others to its problem."""
    advantages = estimator([rewards_of(group, estimator.parts) for group in groups])
    with_advantages = []
    for group, values in zip(groups, advantages, strict=True):
        pairs = zip(group, values.tolist(), strict=True)
        with_advantages.append([replace(record, advantage=value, learned_from=True) for record, value in pairs])
    return with_advantages


def rewards_of(group: Group, parts: Sequence[str]) -> GroupRewards:
    """What a group's answers earned. parts: the names of the rewards that are compared one by one.

    Raises DirlError for a replayed answer that lacks one of them.
    """
    for record in group:
        missing = [name for name in parts if name not in record.parts]
        if missing:
            raise DirlError(f"an answer on record has no reward {missing[0]}: reward it anew with rl.rescore=true")
    return GroupRewards(
        total=torch.tensor([record.reward for record in group]),
        parts=torch.tensor([[record.parts[name] for name in parts] for record in group]),
        tokens=torch.tensor([record.trajectory.num_revealed for record in group]),
    )


def problem_order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> MixtureOrder:
    """The order in which the problems of some sources are drawn."""
    return MixtureOrder(tuple(sizes), tuple(weights), partial(seeded, seed))


def seeded(seed: int, *numbers: int) -> torch.Generator:
    """A generator that depends on nothing but these."""
    return torch.Generator().manual_seed(request_key(seed, list(numbers), 0))
