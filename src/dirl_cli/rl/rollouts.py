"""Where groups of scored answers come from: sampled with dynamic sampling, or read back from an earlier run."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dirl_cli.data.chat import answer_text
from dirl_cli.data.order import Order
from dirl_cli.diffusion.sampling import request_key
from dirl_cli.distributed import balanced
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.reward.rewards import Answer
from dirl_cli.reward.scoring import Scored, Scorer
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
class State:
    """What a run knows besides its parameters.

    step: those done. drawn: problems so far. surplus: groups left over for the next step. ahead: the answers to the
    next step's first problems, where they are sampled while this one learns.
    """

    step: int = 0
    drawn: int = 0
    surplus: list[Answers] = field(default_factory=list)
    ahead: list[Answers] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        kept = {"surplus": self.surplus, "ahead": self.ahead}
        groups = {name: [[to_json(record) for record in group] for group in some] for name, some in kept.items()}
        return {"rl_step": self.step, "drawn": self.drawn, **groups}

    @staticmethod
    def from_json(saved: dict[str, Any]) -> "State":
        surplus, ahead = (
            [[from_json(record) for record in group] for group in saved[name]] for name in ("surplus", "ahead")
        )
        return State(saved["rl_step"], saved["drawn"], surplus, ahead)


@dataclass(frozen=True)
class Sampled:
    """Draws problems in their order and samples, scores and filters groups of answers until enough are kept.

    pool, prompts: the problems and their prompts. problems: a step's. filter: see `has_signal`.
    max_rounds: draws in which to find them. seed: of the answers.
    """

    pool: Sequence[Problem]
    prompts: Sequence[list[int]]
    lm: DiffusionLM
    sampler: Sampler
    scorer: Scorer
    decoding: Decoding
    accelerator: Accelerator
    problems: int
    group_size: int
    filter: str
    max_rounds: int
    order: Order
    seed: int
    lengths: dict[int, float] = field(default_factory=dict)  # by problem: the mean of its last answers, in tokens

    def take(self, state: State) -> tuple[list[Answers], list[Answers]]:
        """The groups to learn from, of earlier steps first, and all that were sampled; moves `state` on."""
        kept, sampled = list(state.surplus), []
        for turn in range(self.max_rounds):
            if len(kept) >= self.problems:
                break
            groups, state.ahead = state.ahead or self.sample(state, turn), []
            state.drawn += self.problems
            for group in groups:
                keep = teaches(group, self.filter)
                group = [replace(record, kept=keep) for record in group]
                sampled.append(group)
                if keep:
                    kept.append(group)
        state.surplus = kept[self.problems :]
        return kept[: self.problems], sampled

    def sample(self, state: State, turn: int) -> list[Answers]:
        """Answers to the next problems, each process sampling its share of them, which all take about as long."""
        places = self.places(state)
        return self.gathered(list(self.own(places, [state.step, turn])), places)

    def places(self, state: State) -> range:
        """Where in the endless order the next problems stand."""
        return range(state.drawn, state.drawn + self.problems)

    def own(self, places: range, moment: list[int]) -> Iterator[Drawn]:
        """The answers of this process's share."""
        shares = balanced([self.cost(self.order[place]) for place in places], self.accelerator.num_processes)
        share = [places[i] for i in shares[self.accelerator.process_index]]
        with self.accelerator.autocast():
            yield from self.answers(share, moment)

    def gathered(self, own: list[Drawn], places: range) -> list[Answers]:
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

        for key, scored in self.scorer.score(finished()):
            record = waiting.pop(key)
            if scored is not None:
                yield places[key[0]], rewarded(record, scored)


@dataclass(frozen=True)
class Replayed:
    """The groups of an earlier run, step by step: those it learned from, and all that a step has on record.

    lm: what is to learn from them. rescores: whether they are rewarded anew.
    """

    files: dict[int, Path]
    lm: DiffusionLM
    rescores: bool = False

    def take(self, state: State) -> tuple[list[Answers], list[Answers]]:
        """As `Sampled.take`. Raises DirlError, with file and line, for an answer that nothing can be learned from."""
        groups: list[Answers] = []
        for place, record in read_lines(self.files[state.step + 1]):
            require_learnable(place, record.trajectory, self.lm)
            if not self.rescores:
                require_rewarded(place, record, groups[0][0] if groups else record)
            if not groups or not continues(groups[-1][-1], record):
                groups.append([])
            groups[-1].append(record)
        return [group for group in groups if group[0].kept], groups


def require_rewarded(place: str, record: Record, first: Record) -> None:
    """Raises DirlError for an answer without a reward, or with others than the `first` of its step."""
    if record.reward is None:
        raise DirlError(f"{place} has no reward: reward it anew with rl.rescore=true")
    if record.parts.keys() != first.parts.keys():
        names = " and ".join(" + ".join(one.parts) or "none" for one in (record, first))
        raise DirlError(f"{place} has other rewards than the first line ({names}): reward it anew with rl.rescore=true")


def replayed(directory: Path, steps: int, lm: DiffusionLM, rescores: bool) -> Replayed:
    """The rollouts of the run in `directory`. Raises DirlError if there is none for one of the steps."""
    files = rollout_files(directory)
    missing = [step for step in range(1, steps + 1) if step not in files]
    if missing:
        raise DirlError(f"{directory} holds no rollout of step {missing[0]}: replay fewer with steps={missing[0] - 1}")
    return Replayed(files, lm, rescores)


def teaches(group: Answers, rule: str) -> bool:
    """Whether a group holds a signal; see `has_signal`."""
    rewards = [record.reward or 0.0 for record in group]
    return len(group) > 0 and has_signal(rewards, [record.correct for record in group], rule)


def holds_signal(groups: Sequence[Answers]) -> bool:
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


def rescored(groups: Sequence[Answers], scorer: Scorer, longest: int, block_size: int) -> list[Answers]:
    """The groups with their answers rewarded anew, without those that have no reward. longest: tokens allowed."""
    found: list[dict[int, Record]] = [{} for _ in groups]
    answers = (
        ((i, k), Answer.of(record.problem, record.trajectory, record.completion, longest, block_size))
        for i, group in enumerate(groups)
        for k, record in enumerate(group)
    )
    for (i, k), scored in scorer.score(answers):
        if scored is not None:
            found[i][k] = rewarded(groups[i][k], scored)
    return [[record for _, record in sorted(group.items())] for group in found if group]


def rewarded(record: Record, scored: Scored) -> Record:
    return replace(record, reward=scored.total, parts=scored.parts, correct=scored.correct)


def continues(last: Record, record: Record) -> bool:
    """Whether a record belongs to the group of the one before it; a problem may be drawn twice in a step."""
    return record.problem == last.problem and record.sample > last.sample and record.kept == last.kept


def with_advantages(groups: Sequence[Answers], advantage: Advantage) -> list[Answers]:
    """The groups with what each answer is worth beside the others."""
    worth = [advantage(torch.tensor([record.reward for record in group])).tolist() for group in groups]
    return [
        [replace(record, advantage=value, kept=True) for record, value in zip(group, values, strict=True)]
        for group, values in zip(groups, worth, strict=True)
    ]


def drawing(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Order:
    """The order in which the problems of some sources are drawn."""

    def seeded(*numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(request_key(seed, list(numbers), 0))

    return Order(tuple(sizes), tuple(weights), seeded)


@contextmanager
def resting(sampler: Sampler) -> Iterator[None]:
    """The sampler gives its memory to the trainer meanwhile."""
    sampler.sleep()
    yield
    sampler.wake()


@contextmanager
def sampling_ahead(source: Sampled, state: State) -> Iterator[None]:
    """The first round of the step after `state`'s is sampled meanwhile, in a thread, and kept in `state`.

    The sampler must hold weights of its own, which nobody touches inside. Nothing is sampled where what is left over
    from earlier rounds will do.
    """
    if len(state.surplus) >= source.problems:
        yield
        return
    device, places, moment = source.accelerator.device, source.places(state), [state.step + 1, 0]
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))  # on which the weights were pushed
    stopped = Event()

    def sample() -> list[Drawn]:
        answers = []
        with torch.cuda.stream(stream) if stream else nullcontext():
            for drawn in source.own(places, moment):
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
        state.ahead = source.gathered(under_way.result(), places)
