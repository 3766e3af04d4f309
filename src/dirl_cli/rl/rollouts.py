"""Where groups of scored answers come from: sampled with dynamic sampling, or read back from an earlier run."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dirl_cli.data.chat import answer_text
from dirl_cli.data.order import Order, epochs
from dirl_cli.diffusion.sampling import request_key
from dirl_cli.distributed import balanced
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.reward.rewards import Answer
from dirl_cli.reward.scoring import RewardComputer, RewardResult
from dirl_cli.rl.advantages import Advantage, has_signal
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.rollout.storage import Record, from_json, read_lines, require_learnable, rollout_files, to_json
from dirl_cli.types import Decoding, Problem

REMEDIES = (
    "give easier problems or a model that is right at times, more decoding.max_new_tokens,"
    " or reference answers in the form that is asked for (dry_run=true shows them)"
)
Answers = list[Record]  # those to one problem
Drawn = tuple[int, Record]  # an answer and its problem's place in the endless order


@dataclass
class RolloutState:
    """How far into the endless order of problems a run is, which its checkpoints keep.

    drawn: problems drawn so far. surplus: groups left over for the next step. ahead: the answers to the next step's
    first problems, where they are sampled while the policy is updated.
    """

    drawn: int = 0
    surplus: list[Answers] = field(default_factory=list)
    ahead: list[Answers] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "surplus": groups_to_json(self.surplus), "ahead": groups_to_json(self.ahead)}

    @staticmethod
    def from_json(saved: dict[str, Any]) -> "RolloutState":
        return RolloutState(saved["drawn"], groups_from_json(saved["surplus"]), groups_from_json(saved["ahead"]))


def groups_to_json(groups: Sequence[Answers]) -> list[list[dict[str, Any]]]:
    return [[to_json(record) for record in group] for group in groups]


def groups_from_json(groups: list[list[dict[str, Any]]]) -> list[Answers]:
    return [[from_json(record) for record in group] for group in groups]


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

    def collect(self, step: int) -> tuple[list[Answers], list[Answers]]:
        """The groups that step `step` (from 0) learns from, and all that were sampled for it; moves `state` on.

        Where it is interrupted, `state` is what it was.
        """
        ...

    def epochs(self) -> dict[str, float]:
        """How often each source of problems has been gone through, as metrics."""
        ...


@dataclass
class RolloutSampler:
    """Draws problems in their order and samples, rewards and filters groups of answers until enough are kept.

    pool, prompts: the problems and their prompts. sources: the names of what they come from. problems: a step's.
    filter: see `has_signal`. max_rounds: draws in which to find them. seed: of the answers. prefetches: whether the
    next step's answers are sampled while the policy is updated.
    """

    pool: Sequence[Problem]
    prompts: Sequence[list[int]]
    lm: DiffusionLM
    sampler: Sampler
    reward_computer: RewardComputer
    decoding: Decoding
    accelerator: Accelerator
    problems: int
    group_size: int
    filter: str
    max_rounds: int
    order: Order
    seed: int
    sources: Sequence[str] = ("",)
    prefetches: bool = False
    state: RolloutState = field(default_factory=RolloutState)
    lengths: dict[int, float] = field(default_factory=dict)  # by problem: the mean of its last answers, in tokens
    is_new = True

    @property
    def answers_per_problem(self) -> int:
        return self.group_size

    def collect(self, step: int) -> tuple[list[Answers], list[Answers]]:
        """See `RolloutSource.collect`; groups left over from earlier steps come first."""
        drawn, prefetched = self.state.drawn, self.state.ahead
        kept, sampled = list(self.state.surplus), []
        for turn in range(self.max_rounds):
            if len(kept) >= self.problems:
                break
            places = range(drawn, drawn + self.problems)
            drawn = places.stop
            groups = prefetched or self.gather(list(self.own(places, [step, turn])), places)
            prefetched = []

            for group in groups:
                keep = group_has_signal(group, self.filter)
                group = [replace(record, kept=keep) for record in group]
                sampled.append(group)
                if keep:
                    kept.append(group)
        self.state = RolloutState(drawn, kept[self.problems :], prefetched)
        return kept[: self.problems], sampled

    def epochs(self) -> dict[str, float]:
        return epochs(self.order, self.sources, self.state.drawn)

    def own(self, places: range, moment: list[int]) -> Iterator[Drawn]:
        """The answers to this process's share of the problems; all shares take about as long."""
        shares = balanced([self.cost(self.order[place]) for place in places], self.accelerator.num_processes)
        share = [places[i] for i in shares[self.accelerator.process_index]]
        with self.accelerator.autocast():
            yield from self.answers(share, moment)

    def gather(self, own: list[Drawn], places: range) -> list[Answers]:
        """Every process's answers, by problem."""
        everyone = gather_object(own) if self.accelerator.num_processes > 1 else own
        found: dict[int, Answers] = {place: [] for place in places}
        for place, record in everyone:
            found[place].append(record)
        for place, group in found.items():
            if group:
                self.lengths[self.order[place]] = fmean(len(record.trajectory.token_ids) for record in group)
        return [sorted(group, key=lambda record: record.sample) for group in found.values()]

    def cost(self, problem: int) -> float:
        """Tokens of a prompt and an answer to it, as long as its last or, until it has one, as all problems'."""
        usual = fmean(self.lengths.values()) if self.lengths else 0.0
        return len(self.prompts[problem]) + self.lengths.get(problem, usual)

    def answers(self, places: Sequence[int], moment: list[int]) -> Iterator[Drawn]:
        """(place, record) of each scored answer to the problems at these places of the endless order.

        moment: step and turn, which with the place make the seed, since a problem may come up again.
        """
        seeds = [request_key(self.seed, [*moment, place], 0) for place in places]
        tokenizer = self.lm.require_tokenizer()
        drawn = [self.order[place] for place in places]
        asked, prompts = [self.pool[i] for i in drawn], [self.prompts[i] for i in drawn]
        waiting: dict[tuple[int, int], Record] = {}

        def finished() -> Iterator[tuple[tuple[int, int], Answer]]:
            for i, sample, trajectory in self.sampler.stream(prompts, self.group_size, self.decoding, seeds=seeds):
                text = answer_text(tokenizer, trajectory.completion_ids)
                waiting[i, sample] = Record(asked[i], sample, text, trajectory)
                longest, block_size = self.decoding.max_new_tokens, self.lm.block_size
                yield (i, sample), Answer.of(asked[i], trajectory, text, longest, block_size)

        for key, scored in self.reward_computer.compute(finished()):
            record = waiting.pop(key)
            if scored is not None:
                yield places[key[0]], rewarded(record, scored)


@dataclass
class RolloutReplay:
    """The groups of an earlier run, step by step: those it learned from, and all that a step has on record.

    lm: what is to learn from them. rescorer: rewards them anew; None leaves their rewards as they are.
    """

    files: dict[int, Path]
    lm: DiffusionLM
    rescorer: "Rescorer | None" = None
    state: RolloutState = field(default_factory=RolloutState)
    answers_per_problem = 0

    @property
    def is_new(self) -> bool:
        return self.rescorer is not None

    def collect(self, step: int) -> tuple[list[Answers], list[Answers]]:
        """See `RolloutSource.collect`.

        Raises DirlError, with file and line, for an answer that nothing can be learned from.
        """
        groups: list[Answers] = []
        for place, record in read_lines(self.files[step + 1]):
            require_learnable(place, record.trajectory, self.lm)
            if not self.rescorer:
                require_rewarded(place, record, groups[0][0] if groups else record)
            if not groups or not continues(groups[-1][-1], record):
                groups.append([])
            groups[-1].append(record)
        if self.rescorer:
            groups = self.rescorer.reward(groups)
            return [group for group in groups if group_has_signal(group, self.rescorer.filter)], groups
        return [group for group in groups if group[0].kept], groups

    def epochs(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Rescorer:
    """Rewards answers anew. filter: see `has_signal`. longest: tokens allowed in an answer."""

    reward_computer: RewardComputer
    filter: str
    longest: int
    block_size: int

    def reward(self, groups: Sequence[Answers]) -> list[Answers]:
        """The groups with their new rewards, without answers that have none and groups that have no answer."""
        rewarded_groups: list[dict[int, Record]] = [{} for _ in groups]
        for (i, k), scored in self.reward_computer.compute(self._answers(groups)):
            if scored is not None:
                rewarded_groups[i][k] = rewarded(groups[i][k], scored)
        return [[group[k] for k in sorted(group)] for group in rewarded_groups if group]

    def _answers(self, groups: Sequence[Answers]) -> Iterator[tuple[tuple[int, int], Answer]]:
        for i, group in enumerate(groups):
            for k, record in enumerate(group):
                yield (
                    (i, k),
                    Answer.of(record.problem, record.trajectory, record.completion, self.longest, self.block_size),
                )


def require_rewarded(place: str, record: Record, first: Record) -> None:
    """Raises DirlError for an answer without a reward, or with others than the `first` of its step."""
    if record.reward is None:
        raise DirlError(f"{place} has no reward: reward it anew with rl.rescore=true")
    if record.parts.keys() != first.parts.keys():
        names = " and ".join(" + ".join(one.parts) or "none" for one in (record, first))
        raise DirlError(f"{place} has other rewards than the first line ({names}): reward it anew with rl.rescore=true")


def rollouts_of(directory: Path, steps: int) -> dict[int, Path]:
    """The files of a run's rollouts by step. Raises DirlError if there is none for one of the steps."""
    files = rollout_files(directory)
    missing = [step for step in range(1, steps + 1) if step not in files]
    if missing:
        raise DirlError(f"{directory} holds no rollout of step {missing[0]}: replay fewer with steps={missing[0] - 1}")
    return files


def group_has_signal(group: Answers, rule: str) -> bool:
    """Whether a group is worth learning from; see `has_signal`."""
    rewards = [record.reward or 0.0 for record in group]
    return len(group) > 0 and has_signal(rewards, [record.correct for record in group], rule)


def any_advantage(groups: Sequence[Answers]) -> bool:
    """Whether any answer is worth more or less than the others to its problem."""
    return any(record.advantage for group in groups for record in group)


def why_without_signal(groups: Sequence[Answers]) -> str:
    """Why there is nothing to learn from these groups, and what to change."""
    answers = [record for group in groups for record in group]
    if not answers:
        return "no answer has a reward: correct what reward.weights names"
    if any(len({record.reward for record in group}) > 1 for group in groups):
        return "no group has right and wrong answers, but rewards differ in some: rl.filter=reward keeps those"
    if all(record.correct for record in answers):
        return "all answers are right: give harder problems"
    if not any(record.correct for record in answers):
        return f"all answers are wrong; {REMEDIES}"
    return "the answers to each problem are all right or all wrong: raise rl.group_size or decoding.temperature"


def rewarded(record: Record, scored: RewardResult) -> Record:
    return replace(record, reward=scored.total, parts=scored.parts, correct=scored.correct)


def continues(last: Record, record: Record) -> bool:
    """Whether a record belongs to the group of the one before it; a problem may be drawn twice in a step."""
    return record.problem == last.problem and record.sample > last.sample and record.kept == last.kept


def add_advantages(groups: Sequence[Answers], advantage: Advantage) -> list[Answers]:
    """The groups with each answer's advantage over the others to its problem."""
    finished = []
    for group in groups:
        values = advantage(torch.tensor([record.reward for record in group])).tolist()
        finished.append(
            [replace(record, advantage=value, kept=True) for record, value in zip(group, values, strict=True)]
        )
    return finished


def problem_order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Order:
    """The order in which the problems of some sources are drawn."""

    def seeded(*numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(request_key(seed, list(numbers), 0))

    return Order(tuple(sizes), tuple(weights), seeded)


def sampler_during_update(
    rollouts: RolloutSource, sampler: Sampler, step: int, is_last: bool
) -> AbstractContextManager[None]:
    """What the sampler does while the policy is updated at step `step` (from 0): it rests, or samples ahead."""
    if isinstance(rollouts, RolloutSampler) and rollouts.prefetches and not is_last:
        return prefetch_rollout(rollouts, step + 1)
    return offloaded(sampler)


@contextmanager
def offloaded(sampler: Sampler) -> Iterator[None]:
    """The sampler gives its memory to the trainer meanwhile."""
    sampler.sleep()
    yield
    sampler.wake()


@contextmanager
def prefetch_rollout(rollouts: RolloutSampler, step: int) -> Iterator[None]:
    """The first round of step `step` is sampled meanwhile, in a thread, and kept in the rollouts' state.

    The sampler must hold weights of its own, which nobody touches inside. Nothing is sampled where what is left over
    from earlier rounds will do.
    """
    state = rollouts.state
    if len(state.surplus) >= rollouts.problems:
        yield
        return

    places = range(state.drawn, state.drawn + rollouts.problems)
    device = rollouts.accelerator.device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))  # on which the weights were pushed
    stopped = Event()

    def sample() -> list[Drawn]:
        answers = []
        with torch.cuda.stream(stream) if stream else nullcontext():
            for drawn in rollouts.own(places, [step, 0]):
                answers.append(drawn)
                if stopped.is_set():
                    break
        return answers

    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(sample)
        try:
            yield
        except BaseException:
            stopped.set()  # the answer that is being written is the last
            raise
        state.ahead = rollouts.gather(under_way.result(), places)
