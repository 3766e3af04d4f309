"""The policy gradient against the true gradient of expected reward, over every answer of a model that has few.

Where candidates had a say in what was revealed (`confidence: sampled`), the log-probs of the revealed tokens are not
those of the action. Where answers differ in length, so does what each is divided by. docs/exactness.md has the figures.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import comb

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import BlockSpec, LeftToRight, MergedTrace, Trace
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rl.advantages import ADVANTAGES
from dirl_cli.rl.batch import TrajectoryGroup, trained_length
from dirl_cli.rl.objective import Objective
from dirl_cli.rl.units import LEVELS
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.logprobs import LogprobModel, trajectory_logprobs
from dirl_cli.types import Decoding, Trajectory
from tests.helpers.algorithms import algorithm
from tests.helpers.paths import ROOT
from tests.helpers.whole_batch import objective_rows
from tests.reference.enumerated import answers, toy

THRESHOLD = {"sampled": 0.7, "max": 0.9, "entropy": 0.75}  # at which a dynamic step reveals now one token, now several
PROMPT = [0, 1, 1, 0]
STOP, LONGEST = 2, 5
GROUP_SIZE = 3
DRAWS = 64  # of random states for each answer

Reward = Callable[[Sequence[int]], float]


def options(strategy: str, confidence: str, steps: int, **more: object) -> Decoding:
    threshold = 1.0 if strategy in ("entropy_bounded", "bounded_adaptive") else THRESHOLD[confidence]
    return Decoding(
        strategy=strategy,
        confidence=confidence,
        denoising_steps=steps,
        threshold=threshold,
        temperature=1.0,
        **{"max_new_tokens": 1, **more},
    )


# Every answer of a model, once ----------------------------------------------------------------------------------------


@dataclass
class Enumerated:
    """All answers to a prompt, their probabilities as a function of the parameters, and their tokens' log-probs."""

    lm: DiffusionLM
    trajectories: list[Trajectory]
    probability: Tensor
    rows: Rows
    logprobs: Tensor

    def true_gradient(self, reward: Reward) -> Tensor:
        """Of minus the expected reward."""
        rewards = torch.tensor([reward(one.completion_ids) for one in self.trajectories])
        return self.gradient(-(self.probability * rewards).sum())

    def gradient(self, loss: Tensor) -> Tensor:
        parameters = list(self.lm.model.parameters())
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([one.flatten() for one in found])

    def estimated(self, objective: Objective, worth: Sequence[float]) -> Tensor:
        """The gradient of the objective's loss where the policy is the one that sampled, for these advantages."""
        advantage = torch.tensor(worth)[self.rows.extras["sample"]]
        rows = replace(
            self.rows, extras={**self.rows.extras, "advantage": advantage, "old_logprobs": self.logprobs.detach()}
        )
        return self.gradient(objective.loss(rows, self.logprobs, torch.zeros_like(self.logprobs))["loss"])

    def with_baseline(self, objective: Objective, reward: Reward, baseline: float) -> Tensor:
        """The expected gradient where the advantage is the reward less a constant."""
        chances = self.probability.tolist()
        worth = [
            chance * (reward(one.completion_ids) - baseline)
            for one, chance in zip(self.trajectories, chances, strict=True)
        ]
        return self.estimated(objective, worth)

    def expected(self, objective: Objective, reward: Reward, train_tail: bool = True) -> Tensor:
        """The expected gradient of a batch that is one group, over all groups there are."""
        kinds = [
            (reward(one.completion_ids), len(one.token_ids) if train_tail else trained_length(one))
            for one in self.trajectories
        ]
        chances = self.probability.tolist()
        chance_of: dict[tuple[float, int], float] = defaultdict(float)
        for kind, chance in zip(kinds, chances, strict=True):
            chance_of[kind] += chance

        # What an answer is worth depends on its own reward and length, and on those of the others. An objective may
        # treat good and bad answers differently, so that they are summed apart.
        worth: dict[bool, dict[tuple[float, int], float]] = {True: defaultdict(float), False: defaultdict(float)}
        for group in product(chance_of, repeat=GROUP_SIZE):
            rewards, lengths = zip(*group, strict=True)
            advantage = ADVANTAGES[objective.advantage](torch.tensor(rewards))[0].item()
            chance = 1.0
            for other in group[1:]:
                chance *= chance_of[other]
            share = chance * advantage * GROUP_SIZE / objective.denominator(lengths, LONGEST)
            worth[advantage >= 0][group[0]] += share
        parts = []
        for of_kind in worth.values():
            parts.append(
                self.estimated(objective, [chance * of_kind[kind] for kind, chance in zip(kinds, chances, strict=True)])
            )
        return torch.stack(parts).sum(0)

    def in_views(self, objective: Objective, train_tail: bool) -> "Enumerated":
        """The same answers in an objective's states, each in many draws of them where they are random."""
        draws = 1 if isinstance(objective.views, Trace | MergedTrace | LeftToRight) else DRAWS
        with torch.no_grad():
            logprobs = trajectory_logprobs(self.lm, self.trajectories)
        ways = [replace(one, logprobs=own) for one, own in zip(self.trajectories, logprobs, strict=True)]
        everything = [TrajectoryGroup(ways, [0.0] * len(ways)) for _ in range(draws)]
        rows, scored = score(self.lm, everything, objective, train_tail)
        return Enumerated(self.lm, ways * draws, self.probability.repeat(draws) / draws, rows, scored)


def score(
    lm: DiffusionLM, groups: Sequence[TrajectoryGroup], objective: Objective, train_tail: bool
) -> tuple[Rows, Tensor]:
    spec = BlockSpec(lm.block_size, lm.mask_token_id)
    rows, _ = objective_rows(groups, objective, spec, 0, 512, train_tail, torch.Generator().manual_seed(0))
    return rows, LogprobModel(lm.model, lm.unsampled_ids)(rows)[0]


@cache
def enumerated(lm_size: tuple[int, int], prompt: tuple[int, ...], decoding: Decoding, train_tail: bool) -> Enumerated:
    """lm_size: the block size and how many tokens there are."""
    lm = toy(*lm_size)
    ways = list(answers(lm, decoding, prompt))
    probability = torch.stack([way.probability for way in ways])
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    trajectories = [
        Trajectory(
            prompt_ids=list(prompt),
            token_ids=list(way.token_ids),
            reveal_step=list(way.reveal_step),
            logprobs=[0.0] * len(way.token_ids),
            stop_token_ids=decoding.stop_token_ids,
        )
        for way in ways
    ]
    everything = [TrajectoryGroup(trajectories, [0.0] * len(trajectories))]
    exact = algorithm("dipo")
    assert exact.views == Trace()
    rows, logprobs = score(lm, everything, exact, train_tail)
    return Enumerated(lm, trajectories, probability, rows, logprobs)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def is_along(estimated: Tensor, true: Tensor) -> bool:
    """Whether it is the true gradient, up to its length."""
    along = true * (estimated @ true) / (true @ true)
    return bool(estimated @ true > 0 and (estimated - along).norm() <= 1e-4 * estimated.norm())


# Which places are revealed --------------------------------------------------------------------------------------------


def of_both_ends(token_ids: Sequence[int]) -> float:
    """Something that asks for tokens together: which of two sides of the cube they are on, plus a little."""
    return float(token_ids[0] != token_ids[-1]) + 0.3 * token_ids[0]


EXACT = [
    ("sequential", "sampled"),  # takes no notice of confidence
    ("low_confidence_static", "max"),
    ("low_confidence_static", "entropy"),
    ("low_confidence_dynamic", "max"),
    ("low_confidence_dynamic", "entropy"),
    ("entropy_bounded", "sampled"),  # goes by entropy alone
    ("probability_margin", "sampled"),  # and this by probabilities
    ("bounded_adaptive", "max"),
]


def one_block(strategy: str, confidence: str, block_size: int, steps: int) -> Enumerated:
    return enumerated((block_size, 2), tuple(PROMPT), options(strategy, confidence, steps), True)


@pytest.mark.parametrize(("block_size", "steps"), [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize(("strategy", "confidence"), EXACT)
def test_the_policy_gradient_is_the_true_one_where_tokens_have_no_say_in_the_order(
    strategy, confidence, block_size, steps
):
    found = one_block(strategy, confidence, block_size, steps)
    true = found.true_gradient(of_both_ends)
    assert true.norm() > 0.1
    estimated = found.with_baseline(algorithm("dipo"), of_both_ends, baseline=0.5)
    assert (estimated - true).norm() <= 1e-4 * true.norm()


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic"])
def test_it_is_biased_where_the_confidence_is_that_of_the_drawn_token(strategy):
    found = one_block(strategy, "sampled", 4, 4)
    estimated = found.with_baseline(algorithm("dipo"), of_both_ends, baseline=0.5)
    apart = cosine(found.true_gradient(of_both_ends), estimated)
    print(f"\n{strategy}, confidence sampled: cosine {apart:.2f} with the true gradient")
    assert apart < 0.99


@pytest.mark.parametrize("confidence", ["sampled", "max", "entropy"])
def test_dynamic_trajectories_differ_in_the_number_of_their_steps(confidence):
    found = one_block("low_confidence_dynamic", confidence, 4, 4)
    assert len({max(one.reveal_step) for one in found.trajectories}) > 1


# Answers of one, three and five tokens --------------------------------------------------------------------------------


def right(token_ids: Sequence[int]) -> float:
    """0 or 1."""
    return float(len(token_ids) > 0 and token_ids[0] == 1)


def graded(token_ids: Sequence[int]) -> float:
    """Right, and a little for each token."""
    return right(token_ids) + 0.1 * len(token_ids)


REWARDS = {"0 or 1": right, "graded": graded}


def ragged(strategy: str, confidence: str, train_tail: bool = True) -> Enumerated:
    """A prompt that ends inside a block of two: the answer's blocks are of one, two and two tokens."""
    decoding = options(strategy, confidence, 2, max_new_tokens=LONGEST, stop_token_ids=(STOP,))
    return enumerated((2, 3), (0, 1, 1), decoding, train_tail)


@pytest.mark.parametrize(("block_size", "prompt", "longest"), [(2, (0, 1, 1), LONGEST), (2, tuple(PROMPT), 2)])
@pytest.mark.parametrize("confidence", ["sampled", "max"])
def test_the_sampler_gives_these_answers_as_often_as_computed(confidence, block_size, prompt, longest):
    decoding = options("low_confidence_static", confidence, 2, max_new_tokens=longest, stop_token_ids=(STOP,))
    found, n = enumerated((block_size, 3), prompt, decoding, True), 4000
    chances = zip(found.trajectories, found.probability.tolist(), strict=True)
    computed = {(tuple(one.token_ids), tuple(one.reveal_step)): chance for one, chance in chances}
    [sampled] = NativeSampler(found.lm, max_batch=1000).sample([list(prompt)], n, decoding)
    counted = Counter((tuple(one.token_ids), tuple(one.reveal_step)) for one in sampled)
    assert set(counted) <= set(computed)
    chi_square = sum((counted[way] - n * chance) ** 2 / (n * chance) for way, chance in computed.items())
    freedom = len(computed) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_answers_end_with_the_block_of_their_stop_token():
    found = ragged("low_confidence_static", "max")
    assert Counter(len(one.token_ids) for one in found.trajectories) == {1: 1, 3: 2 * 5, 5: 2 * 4 * 9}


@pytest.mark.parametrize("level", LEVELS)
def test_with_a_constant_baseline_dividing_by_a_constant_is_exact_at_every_level(level):
    found = ragged("low_confidence_static", "max")
    objective = algorithm("dipo", level=level)  # whose normaliser is here 1 for all
    if level == "answer":  # one term an answer, which counts once where answers are averaged
        objective = algorithm("dipo", level=level, normalizer="sequence")
    true = found.true_gradient(right)
    for baseline in (0.0, 0.5):
        estimated = found.with_baseline(objective, right, baseline)
        assert (estimated - true).norm() <= 1e-4 * true.norm()


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_dividing_by_an_answers_own_length_is_not_even_without_a_baseline_and_a_baseline_moves_it(name):
    found = ragged("low_confidence_static", "max")
    true = found.true_gradient(right)
    plain, lowered = (found.with_baseline(algorithm(name), right, baseline) for baseline in (0.0, 0.5))
    assert cosine(plain, true) < 0.99
    assert (lowered - plain).norm() > 0.1 * true.norm()  # half the expected score, which should be zero


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize(("strategy", "confidence"), EXACT)
def test_dr_grpo_is_the_true_gradient_up_to_a_constant_that_is_known(strategy, confidence, reward):
    found = ragged(strategy, confidence)
    true = found.true_gradient(REWARDS[reward])
    for advantage, shrunk in (("mean_only", 1 - 1 / GROUP_SIZE), ("leave_one_out", 1.0)):
        estimated = found.expected(algorithm("dr_grpo", advantage=advantage), REWARDS[reward])
        assert (estimated * LONGEST / shrunk - true).norm() <= 1e-4 * true.norm()


def test_without_its_tail_an_answer_is_learned_from_exactly_if_sequential_and_else_nearly():
    for strategy, is_exact in (("sequential", True), ("low_confidence_static", False)):
        found = ragged(strategy, "max", train_tail=False)
        estimated = found.expected(algorithm("dr_grpo"), right, train_tail=False)
        assert is_along(estimated, found.true_gradient(right)) == is_exact


def test_dividing_by_the_spread_weighs_problems_by_how_often_they_are_solved():
    """Of rewards of 0 and 1: the gradient's length, on average, as a multiple of that of the success rate."""

    def weight(advantage: str, rate: float, size: int = 8) -> float:
        total = 0.0
        for wins in range(size + 1):
            rewards = torch.tensor([1.0] * wins + [0.0] * (size - wins))
            chance = comb(size, wins) * rate**wins * (1 - rate) ** (size - wins)
            total += chance * (ADVANTAGES[advantage](rewards) * (rewards - rate)).sum().item()
        return total / (size * rate * (1 - rate))

    assert weight("normalised", 0.01) / weight("normalised", 0.5) == pytest.approx(1.4, abs=0.05)
    for advantage, constant in (("mean_only", 7 / 8), ("leave_one_out", 1.0)):
        assert weight(advantage, 0.01) == pytest.approx(constant, rel=1e-4)
        assert weight(advantage, 0.5) == pytest.approx(constant, rel=1e-4)


# The page -------------------------------------------------------------------------------------------------------------


def page() -> dict[str, list[str]]:
    """The rows of the table of docs/exactness.md: what follows `dirl rl`, and the cosines."""
    lines = (ROOT / "docs/exactness.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `algo")]
    return {row[0].strip("`"): row[1:3] for row in cells}


def rows_of_the_page() -> list[object]:
    """The commands of the page; those whose states are random take a while."""
    rows = []
    for words in page():
        name = words.split()[0].removeprefix("algo=")
        is_random = not isinstance(algorithm(name).views, Trace | MergedTrace | LeftToRight)
        rows.append(pytest.param(words, marks=pytest.mark.slow) if is_random else words)
    return rows


@pytest.mark.parametrize("words", rows_of_the_page())
def test_the_page_tells_the_cosines_that_are_found(words):
    chosen = dict(word.split("=") for word in words.split())
    changes = OmegaConf.from_dotlist([word.removeprefix("algo.") for word in words.split() if "algo." in word])
    train_tail = chosen.get("rl.train_tail") != "false"
    strategy, confidence = chosen.get("decoding", "low_confidence_static"), chosen.get("decoding.confidence", "max")
    found = ragged(strategy, confidence, train_tail)
    objective = algorithm(chosen["algo"], **changes, beta=0.0)  # the reference is the policy
    found = found.in_views(objective, train_tail)
    for reward, told in zip(REWARDS.values(), page()[words], strict=True):
        estimated, true = found.expected(objective, reward, train_tail), found.true_gradient(reward)
        assert is_along(estimated, true) == (told == "exact"), f"cosine {cosine(estimated, true):.4f}"
        if told != "exact":
            assert cosine(estimated, true) == pytest.approx(float(told), abs=3e-4)
