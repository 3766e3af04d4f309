"""Rollouts whose sampler and rewards are written by hand: what is drawn, kept and asked can be counted."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

from accelerate import Accelerator

from dirl_cli.reward.scoring import RewardResult, RewardSettings
from dirl_cli.rl.rollouts import SampledRollouts, problem_order
from dirl_cli.rollout.sampler import Stint
from dirl_cli.types import Decoding, Problem, Trajectory

POOL = [Problem(str(i), f"what is {i}?", str(i)) for i in range(6)]


@dataclass
class FakeSampler:
    """Answers are the number of the sample, or the first token of its hint, the last ones first.

    What a stint does not wait for is left with one block, and ends in the next. Notes every request, and with what
    stints began: pairs of prompt and sample that were under way.
    """

    asked: list[tuple[int, int]] = field(default_factory=list)  # prompt, seed
    lm: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(block_size=2))
    weights_version: int = 3
    went_on: list[set[tuple[int, int]]] = field(default_factory=list)

    def set_block_size(self, block_size: int) -> None:
        self.lm.block_size = block_size

    def stream(self, prompts, n, decoding, seeds, hints=None, stint=None) -> Iterator[tuple[int, int, Trajectory]]:
        self.asked += [(prompt[0], seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        stint = stint or Stint(len(prompts))
        self.went_on.append({(prompts[i][0], sample) for i, sample in stint.under_way})
        for i in reversed(range(len(prompts))):
            for sample in reversed(range(n)):
                key = i, sample
                if key in stint.finished:
                    continue
                if i >= stint.waited_for and key not in stint.under_way:
                    version = self.weights_version
                    stint.under_way[key] = Trajectory(
                        prompts[i], [sample], [1], [-0.5], forwards=1, denoise_forwards=1, weights_version=version
                    )
                    continue
                stint.under_way.pop(key, None)
                hint = hints[i][sample] if hints else {}
                step = 0 if 0 in hint else 1
                tokens = [hint.get(0, sample), 9]
                yield (
                    i,
                    sample,
                    Trajectory(prompts[i], tokens, [step, 1], [-0.5, -0.25], "stop", 1, 2, self.weights_version, (9,)),
                )


ACCURACY = RewardSettings({"accuracy": 1.0})


@dataclass
class FakeScorer:
    """Gives the sample's number among the problem's rewards; None leaves the answer out."""

    rewards: dict[str, list[float | None]]
    settings: RewardSettings = ACCURACY

    def compute(self, answers):
        for key, answer in answers:
            reward = self.rewards[answer.problem.id][int(answer.completion)]
            yield key, None if reward is None else RewardResult(reward, {"accuracy": reward}, reward == 1)


def source(rewards: dict[str, list[float | None]], settings: RewardSettings = ACCURACY, **options) -> SampledRollouts:
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(map(str, ids)))
    lm = SimpleNamespace(require_tokenizer=lambda: tokenizer, block_size=2, longest_prompt=99)
    defaults = {"problems_per_step": 2, "group_size": 2, "filter": "accuracy", "max_rounds": 3, "seed": 0}
    defaults["order"] = problem_order([len(POOL)], [1.0], 0)
    decoding, prompts = Decoding(max_new_tokens=4), [[i] for i in range(len(POOL))]
    doubles = FakeSampler(), FakeScorer(rewards, settings)
    return SampledRollouts(POOL, prompts, lm, *doubles, decoding, Accelerator(cpu=True), **defaults | options)


def order(epoch: int = 0) -> list[str]:
    """The ids of the problems as seed 0 draws them."""
    places = range(epoch * len(POOL), (epoch + 1) * len(POOL))
    return [POOL[problem_order([len(POOL)], [1.0], 0)[place]].id for place in places]


def each(rewards: list[float | None]) -> dict[str, list[float | None]]:
    """The same rewards for the answers to every problem."""
    return {problem.id: rewards for problem in POOL}


def ids(groups) -> list[str]:
    return [group[0].problem.id for group in groups]


MIXED, SAME = [1.0, 0.0], [0.0, 0.0]
