"""Where a step's groups of answers come from: rounds of problems that are sampled, with dynamic sampling."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from statistics import fmean

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dirl_cli.data.chat import answer_text
from dirl_cli.data.order import MixtureOrder, epochs
from dirl_cli.diffusion.sampling import request_key
from dirl_cli.distributed import split_by_cost
from dirl_cli.models.load import DiffusionLM
from dirl_cli.reward.rewards import Answer
from dirl_cli.reward.scoring import RewardComputer
from dirl_cli.rl.block_growth import NO_GROWTH, BlockGrowth
from dirl_cli.rl.curriculum import EVERYTHING, Curriculum
from dirl_cli.rl.groups import (
    Decode,
    Group,
    group_has_signal,
    pass_rate,
    ranked_group,
    revealed_blocks,
    with_reward,
)
from dirl_cli.rl.hints import NO_HINTS, Hints, is_all_wrong
from dirl_cli.rl.rollout_state import Rollout, RolloutState
from dirl_cli.rl.rounds import Outcome, Round, with_outcomes
from dirl_cli.rollout.arrays import with_arrays
from dirl_cli.rollout.sampler import Hint, Sampler, Stint
from dirl_cli.rollout.storage import Record
from dirl_cli.types import Decoding, Problem

HINTING, TAKING_IN = 1, 2  # at the end of a seed's numbers: what it is for


@dataclass
class SampledRollouts:
    """Groups sampled from the policy: problems are drawn in their order, answered and rewarded until enough pass.

    pool, prompts: the problems and their prompts. sources: the names of what they come from. filter: see `has_signal`.
    max_rounds: draws in which to find a step's problems. seed: of the answers. rounds_ahead: how many may be under way
    while the policy is updated. partial_rollouts: whether answers that are under way go on with new weights, or begin
    again. most_stale: optimizer steps that weights may have fallen behind when their answers are learned from.
    curriculum: which problems are passed over. decode: the text of tokens, where steps are rewarded by it. hints: for
    groups that are all wrong, from the problems' `solutions`, in tokens. growth: of the blocks to sample in.
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
    rounds_ahead: int = 0
    partial_rollouts: bool = True
    most_stale: float = inf
    curriculum: Curriculum = EVERYTHING
    decode: Decode | None = None
    hints: Hints = NO_HINTS
    solutions: Sequence[Sequence[int]] = ()
    growth: BlockGrowth = NO_GROWTH
    state: RolloutState = field(default_factory=RolloutState)
    is_new = True

    @property
    def answers_per_problem(self) -> int:
        return self.group_size

    def collect(self, step: int) -> Rollout:
        """See `RolloutSource.collect`; groups left over from earlier steps come first, then rounds sampled ahead."""
        drawn = self.state.drawn
        rests_until = dict(self.state.rests_until)
        lengths = dict(self.state.lengths)
        rounds = self.state.rounds
        surplus = self.surplus(step)
        selected = self.fresh(surplus)
        too_stale = len(surplus) - len(selected)
        sampled: list[Group] = []
        hinted: list[Group] = []
        num_with_signal = 0

        # Dynamic sampling (DAPO): groups without a signal make way for other problems, up to max_rounds times.
        for number in range(self.max_rounds):
            if len(selected) >= self.problems_per_step:
                break
            rounds = self.sample(rounds or [self.draw(step, number, drawn, rests_until)])
            whole, rounds = rounds[0], rounds[1:]
            drawn = whole.drawn
            lengths |= {self.order[index]: tokens for index, tokens in whole.lengths.items()}
            groups = [self.ranked(group) for group in whole.groups]
            rests_until |= self.curriculum.rests(self.order, whole.indices, [pass_rate(group) for group in groups])

            sampled += groups
            if self.hints.most:
                groups, sampled_again = self.take_in_hinted(groups, whole.indices, step, number)
                hinted += sampled_again
            passing = [group for group in groups if group_has_signal(group, self.filter)]
            fresh = self.fresh(passing)
            selected += fresh
            num_with_signal += len(passing)
            too_stale += len(passing) - len(fresh)

        # Set at the end alone: a rollout that is interrupted has not happened.
        resting = {problem: index for problem, index in rests_until.items() if index > drawn}
        self.state = RolloutState(drawn, selected[self.problems_per_step :], rounds, resting, lengths)
        with_hints = hinted if self.hints.most else None
        return Rollout(selected[: self.problems_per_step], sampled, num_with_signal, with_hints, too_stale)

    def surplus(self, step: int) -> list[Group]:
        """The groups left over that step `step` can learn from: those in blocks of its size."""
        block_size = self.growth.at(self.lm, step).block_size
        fitting = []
        for group in self.state.surplus:
            if all(record.trajectory.block_size in (None, block_size) for record in group):
                fitting.append(group)
        return fitting

    def fresh(self, groups: Sequence[Group]) -> list[Group]:
        """The groups of answers none of which has a block of weights that are too old to learn from it."""
        oldest = self.sampler.weights_version - self.most_stale
        return [group for group in groups if all(record.trajectory.weights_version >= oldest for record in group)]

    def epochs(self) -> dict[str, float]:
        metrics = epochs(self.order, self.sources, self.state.drawn)
        if self.curriculum != EVERYTHING:
            metrics["resting"] = len(self.state.rests_until)
        return metrics

    def draw(self, step: int, number: int, drawn: int, rests_until: Mapping[int, int]) -> Round:
        """The next problems of the endless order, from `drawn` on, of which no answer is there yet."""
        indices, drawn = self.curriculum.indices(self.order, drawn, self.problems_per_step, rests_until)
        return Round(step, number, indices, drawn, self.group_size)

    def draw_ahead(self, step: int, most: int) -> list[Round]:
        """The rounds under way, the first of them for step `step` (from 0), with as many more as make `most`."""
        rounds = list(self.state.rounds)
        for i in range(len(rounds), most):
            drawn = rounds[-1].drawn if rounds else self.state.drawn
            rounds.append(self.draw(step + i, 0, drawn, self.state.rests_until))
        return rounds

    def take_in_hinted(
        self, groups: Sequence[Group], indices: Sequence[int], step: int, round_number: int
    ) -> tuple[list[Group], list[Group]]:
        """The groups, those that are all wrong with right answers sampled with hints; and all that were sampled so."""
        all_wrong = [index for index, group in zip(indices, groups, strict=True) if is_all_wrong(group)]
        if not all_wrong:
            return list(groups), []
        again = Round(step, round_number, all_wrong, 0, self.group_size)
        sampled_again = [self.ranked(group) for group in self.sample([again], with_hints=True)[0].groups]
        by_index = dict(zip(all_wrong, sampled_again, strict=True))

        improved = []
        for index, group in zip(indices, groups, strict=True):
            if index in by_index:
                generator = seeded(self.seed, step, round_number, index, TAKING_IN)
                group = self.ranked(self.hints.take_in(group, by_index[index], generator))
            improved.append(group)
        return improved, sampled_again

    def sample(self, rounds: list[Round], with_hints: bool = False) -> list[Round]:
        """The rounds once the first of them is whole; what there was time for of the others goes along."""
        if rounds[0].is_whole:
            return rounds
        return self.gather(list(self.sample_share(rounds, with_hints=with_hints)), rounds)

    def sample_share(self, rounds: Sequence[Round], more: int = 0, with_hints: bool = False) -> Iterator[Outcome]:
        """What one stint gives of this process's share of the rounds, each as it ends; all shares take about as long.

        It ends when the first round is whole, and `more` answers to the others have ended.
        """
        processes = self.accelerator.num_processes
        asked = []  # the place of a round, and the index of a problem
        for place, one in enumerate(rounds):
            missing = one.missing
            shares = split_by_cost([self.cost(self.order[index]) for index in missing], processes)
            asked += [(place, missing[i]) for i in shares[self.accelerator.process_index]]
        self.sampler.set_block_size(self.growth.at(self.lm, rounds[0].step).block_size)
        with self.accelerator.autocast():
            yield from self.answers(rounds, asked, more // processes, with_hints)

    def half_of_next(self, rounds: Sequence[Round]) -> int:
        """How many answers to later rounds are to end while the policy is updated: up to those of half a round.

        So no update passes with nothing sampled because its round was whole before, and none waits for the longest
        answers of two. Whole groups, so that a server that is asked for one after the other is asked for no part of it.
        """
        if len(rounds) < 2:
            return 0
        ended = sum(len(one.answers) for one in rounds[1:])
        return max(len(rounds[1].indices) // 2 * self.group_size - ended, 0)

    def gather(self, own_outcomes: list[Outcome], rounds: Sequence[Round]) -> list[Round]:
        """The rounds with what came of every process's share."""
        outcomes = own_outcomes
        if self.accelerator.num_processes > 1:
            answers = with_arrays(outcome for *_, outcome in own_outcomes)
            own_places = [outcome[:3] for outcome in own_outcomes]
            outcomes = gather_object([(*place, answer) for place, answer in zip(own_places, answers, strict=True)])
        return with_outcomes(rounds, outcomes)

    def ranked(self, group: Group) -> Group:
        """The group with the rewards that compare its answers."""
        return ranked_group(group, self.reward_computer.settings, self.sampler.lm.block_size)

    def cost(self, problem: int) -> float:
        """Tokens of a prompt and an answer to it, as long as its last or, until it has one, as all problems'."""
        lengths = self.state.lengths
        usual = fmean(lengths.values()) if lengths else 0.0
        return len(self.prompts[problem]) + lengths.get(problem, usual)

    def answers(
        self, rounds: Sequence[Round], asked: Sequence[tuple[int, int]], more: int, with_hints: bool
    ) -> Iterator[Outcome]:
        """Each rewarded answer to some problems as it is ready, then what there is of others.

        asked: for each problem the place of its round, and its index in the endless order. more: see `sample_share`.
        """
        # With the index, step and number make the seed, since a problem may come up again.
        purpose = [HINTING] if with_hints else []
        problems, prompts, seeds, hints = [], [], [], []
        for place, index in asked:
            step, number = rounds[place].step, rounds[place].number
            problems.append(self.pool[self.order[index]])
            prompts.append(self.prompts[self.order[index]])
            seeds.append(request_key(self.seed, [step, number, index, *purpose], 0))
            if with_hints:
                hints.append(self.draw_hints(index, step, number))
        stint = self.stint(rounds, asked, more)
        tokenizer = self.lm.require_tokenizer()
        waiting: dict[tuple[int, int], Record] = {}  # for their rewards

        def sampled_answers() -> Iterator[tuple[tuple[int, int], Answer]]:
            stream = self.sampler.stream(
                prompts, self.group_size, self.decoding, seeds=seeds, hints=hints or None, stint=stint
            )
            for i, sample, trajectory in stream:
                text = answer_text(tokenizer, trajectory.completion_ids)
                waiting[i, sample] = Record(problems[i], sample, text, trajectory)
                longest, block_size = self.decoding.max_new_tokens, self.sampler.lm.block_size
                blocks = revealed_blocks(self.decode, trajectory, block_size)
                yield (i, sample), Answer.of(problems[i], trajectory, text, longest, block_size, blocks)

        # `compute` draws from the answers, so that sampling goes on while earlier answers are graded.
        for (i, sample), result in self.reward_computer.compute(sampled_answers()):
            record = waiting.pop((i, sample))
            yield *asked[i], sample, record if result is None else with_reward(record, result)
        for (i, sample), trajectory in stint.under_way.items():
            yield *asked[i], sample, trajectory

    def stint(self, rounds: Sequence[Round], asked: Sequence[tuple[int, int]], more: int) -> Stint:
        """What a stream is to sample of what is asked: all of the first round, as much of others as there is time for.

        Where answers do not go on with new weights, they begin again.
        """
        prompt_of = {place_and_index: i for i, place_and_index in enumerate(asked)}
        stint = Stint(waited_for=sum(place == 0 for place, _ in asked), more=more)
        finished = set()
        for place, one in enumerate(rounds):
            for index, record in one.answers:
                if (place, index) in prompt_of:
                    finished.add((prompt_of[place, index], record.sample))
            for index, sample, trajectory in one.under_way:
                is_current = trajectory.token_versions[-1] == self.sampler.weights_version
                if (place, index) in prompt_of and (self.partial_rollouts or is_current):
                    stint.under_way[prompt_of[place, index], sample] = trajectory
        stint.finished = finished
        return stint

    def draw_hints(self, index: int, step: int, round_number: int) -> list[Hint]:
        """A hint for each answer to the problem at an index of the endless order."""
        problem = self.order[index]
        room = self.lm.longest_prompt + 1 - len(self.prompts[problem])
        longest = min(self.decoding.max_new_tokens, room)
        generator = seeded(self.seed, step, round_number, index, HINTING)
        return [self.hints.hint(self.solutions[problem], longest, generator) for _ in range(self.group_size)]


def problem_order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> MixtureOrder:
    """The order in which the problems of some sources are drawn."""
    return MixtureOrder(tuple(sizes), tuple(weights), partial(seeded, seed))


def seeded(seed: int, *numbers: int) -> torch.Generator:
    """A generator that depends on nothing but these."""
    return torch.Generator().manual_seed(request_key(seed, list(numbers), 0))
