"""Every algorithm against its formula written out: one forward a state, one term a token, no packing."""

from collections.abc import Iterator
from math import exp

import pytest
import torch
from omegaconf import OmegaConf
from torch import Generator, Tensor

from dirl_cli.cli.build import build
from dirl_cli.diffusion.states import Trace
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rl.advantages import ADVANTAGES, has_signal
from dirl_cli.rl.batch import Group
from dirl_cli.rl.objective import KL, LEVELS, NORMALIZERS, Objective, ratio_of
from dirl_cli.rl.update import corrections
from dirl_cli.training.logprobs import trajectory_logprobs
from dirl_cli.types import Trajectory
from tests.helpers.answers import ANSWERS, BLOCK, LONGEST, REWARDS, STOP, answer, assert_same, gradient, packed
from tests.helpers.paths import ROOT
from tests.helpers.small import MASK, PAD, small_lm
from tests.reference.expanded import dipo_sum, expand, expanded_logprobs

ALGO = ROOT / "conf" / "algo"


def algorithm(name: str, **changed) -> Objective:
    return build(OmegaConf.merge(OmegaConf.load(ALGO / f"{name}.yaml"), changed))


def groups(advantage: str = "normalised") -> list[Group]:
    worth = ADVANTAGES[advantage]
    return [Group(a, worth(torch.tensor(r)).tolist()) for a, r in zip(ANSWERS, REWARDS, strict=True)]


# States: (tokens up to the end of a block, {answer token scored there: its weight}) -----------------------------------

States = Iterator[tuple[list[int], dict[int, float]]]


def blocks(one: Trajectory) -> Iterator[tuple[list[int], range]]:
    full, start = [*one.prompt_ids, *one.token_ids], len(one.prompt_ids)
    for begin in range(start // BLOCK * BLOCK, len(full), BLOCK):
        yield full, range(max(begin, start), begin + BLOCK)


def hidden(full: list[int], places: range, masked: set[int]) -> list[int]:
    return [MASK if place in masked else token for place, token in enumerate(full[: places.stop])]


def as_sampled(one: Trajectory, generator: Generator, merged: int = 1) -> States:
    start = len(one.prompt_ids)
    for full, places in blocks(one):
        at = {place: -(-one.reveal_step[place - start] // merged) for place in places}
        for step in sorted(set(at.values())):
            masked = {place for place in places if at[place] >= step}
            yield hidden(full, places, masked), {place - start: 1.0 for place in places if at[place] == step}


def two_steps_as_one(one: Trajectory, generator: Generator) -> States:
    return as_sampled(one, generator, merged=2)


def left_to_right(one: Trajectory, generator: Generator) -> States:
    for full, places in blocks(one):
        for place in places:
            yield hidden(full, places, set(range(place, places.stop))), {place - len(one.prompt_ids): 1.0}


def whole_answer(one: Trajectory, generator: Generator) -> States:
    full, start = [*one.prompt_ids, *one.token_ids], len(one.prompt_ids)
    lost = torch.rand(len(full), generator=generator) < 0.15
    masked = {place for place in range(len(full)) if place >= start or lost[place]}
    yield hidden(full, range(len(full)), masked), dict.fromkeys(range(len(one.token_ids)), 1.0)


def one_random_mask(one: Trajectory, generator: Generator) -> States:
    rate = 0.1 + 0.8 * torch.rand(1, 1, generator=generator)
    drawn = (torch.rand(1, len(one.token_ids), generator=generator) < rate)[0]
    yield from under_mask(one, {k for k in range(len(drawn)) if drawn[k] or not drawn.any()}, 1.0)


def mask_and_complement(one: Trajectory, generator: Generator) -> States:
    rate = (0.2 + 0.6 * torch.rand(1, generator=generator)).item()
    drawn = torch.rand(len(one.token_ids), generator=generator) < rate
    yield from under_mask(one, {k for k in range(len(drawn)) if drawn[k]}, 1 / (2 * rate))
    yield from under_mask(one, {k for k in range(len(drawn)) if not drawn[k]}, 1 / (2 * (1 - rate)))


def under_mask(one: Trajectory, masked: set[int], weight: float) -> States:
    start = len(one.prompt_ids)
    for full, places in blocks(one):
        inside = {start + k for k in masked} & set(places)
        if inside:
            yield hidden(full, places, inside), {place - start: weight for place in inside}


# One forward a state --------------------------------------------------------------------------------------------------


def state_logprobs(lm: DiffusionLM, state: list[int]) -> Tensor:
    """(L, V) under the rule of inference: all of the own block and of those before it."""
    block = torch.arange(len(state)) // BLOCK
    seen = block[:, None] >= block[None, :]
    logits = lm.model(input_ids=torch.tensor([state]), attention_mask=seen[None, None]).logits[0].float()
    return logits.index_fill(-1, torch.tensor(lm.unsampled_ids), -torch.inf).log_softmax(-1)


# Advantages, surrogates and normalisers as the papers write them ------------------------------------------------------


def grouped(rewards: list[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    spread = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / spread for r in rewards]


def centred(rewards: list[float]) -> list[float]:
    return [r - sum(rewards) / len(rewards) for r in rewards]


def against_the_others(rewards: list[float]) -> list[float]:
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]


def surrogate(log_ratio: Tensor, worth: float, low: float, high: float) -> Tensor:
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * worth, ratio.clamp(1 - low, 1 + high) * worth)


def k2(to_reference: Tensor) -> Tensor:
    return to_reference**2 / 2


def k3(to_reference: Tensor) -> Tensor:
    return to_reference.exp() - to_reference - 1


FORMULAS = {  # states, advantages, mean over, ε_low, ε_high, divergence
    "dipo": (as_sampled, grouped, "tokens", 0.2, 0.28, k3),
    "dr_grpo": (as_sampled, centred, "the longest allowed", 0.2, 0.2, k2),
    "grpo": (as_sampled, grouped, "answers", 0.2, 0.2, k3),
    "tracerl": (two_steps_as_one, grouped, "tokens", 0.2, 0.2, k2),
    "diffu_grpo": (whole_answer, centred, "tokens", 0.2, 0.2, k3),
    "unigrpo": (one_random_mask, grouped, "answers", 0.2, 0.2, k3),
    "coupled_masks": (mask_and_complement, against_the_others, "answers", 0.2, 0.2, k3),
    "justgrpo": (left_to_right, grouped, "answers", 0.2, 0.2, k3),
    "gspo": (as_sampled, grouped, "one ratio an answer", 3e-4, 4e-4, k3),
    "espo": (mask_and_complement, grouped, "one ratio an answer", 0.2, 0.2, k2),
}


def written_out(
    name: str, lm: DiffusionLM, old: Tensor, reference: Tensor, beta: float, train_tail: bool
) -> tuple[float, Tensor]:
    states, advantages, mean_over, low, high, divergence = FORMULAS[name]
    generator = torch.Generator().manual_seed(7)
    sample, tokens, answers, summed, meant = 0, 0, 0, torch.zeros(()), torch.zeros(())
    for some, rewards in zip(ANSWERS, REWARDS, strict=True):
        for one, worth in zip(some, advantages(rewards), strict=True):
            trained = len(one.token_ids)
            if STOP in one.token_ids and not train_tail:
                trained = one.token_ids.index(STOP) + 1
            of_answer, log_ratio, to_reference = torch.zeros(()), torch.zeros(()), torch.zeros(())
            for state, scored in states(one, generator):
                logprobs = state_logprobs(lm, state)
                for k, weight in scored.items():
                    if k >= trained:
                        continue
                    own = logprobs[len(one.prompt_ids) + k, one.token_ids[k]]
                    difference = own - (own.detach() + old[sample, k])
                    distance = own.detach() + reference[sample, k] - own
                    term = surrogate(difference, worth, low, high) + beta * divergence(distance)
                    of_answer = of_answer + weight * term
                    log_ratio = log_ratio + weight * difference / trained
                    to_reference = to_reference + weight * distance / trained
            if mean_over == "one ratio an answer":
                of_answer = trained * (surrogate(log_ratio, worth, low, high) + beta * divergence(to_reference))
            summed, meant = summed + of_answer, meant + of_answer / trained
            sample, tokens, answers = sample + 1, tokens + trained, answers + 1
    if mean_over == "tokens":
        loss = summed / tokens
    elif mean_over == "the longest allowed":
        loss = summed / (answers * LONGEST)
    else:
        loss = meant / answers
    lm.model.zero_grad()
    loss.backward()
    return loss.item(), gradient(lm)


def shifts(name: str) -> tuple[Tensor, Tensor]:
    """Old and reference log-probs beside the present ones: on either side of the clip, so that some are clipped."""
    generator = torch.Generator().manual_seed(1)
    size = 1.5 * FORMULAS[name][3]
    old = size * (torch.randn(9, 1, generator=generator) + 0.3 * torch.randn(9, 10, generator=generator))
    return old, 0.3 * torch.randn(9, 10, generator=generator)


def test_every_algorithm_has_a_formula_here():
    assert sorted(FORMULAS) == sorted(path.stem for path in ALGO.glob("*.yaml"))


@pytest.mark.parametrize(("beta", "train_tail"), [(0.0, True), (0.5, False)])
@pytest.mark.parametrize("name", FORMULAS)
def test_an_algorithm_equals_its_formula_in_loss_and_gradient(name, beta, train_tail):
    lm = small_lm(scale=3.0)
    objective = algorithm(name, beta=beta)
    old, reference = shifts(name)
    loss, grad, watched = packed(
        lm, objective, groups(objective.advantage), old, reference, row_tokens=64, train_tail=train_tail
    )
    assert 0.05 < watched["clipped"] / watched["weight"] < 0.95  # both branches of the minimum are met
    assert_same((loss, grad), written_out(name, lm, old, reference, beta, train_tail))


def policy_gradient(lm: DiffusionLM, normalizer: str) -> Tensor:
    """-Σ A ∇log p / norm."""
    total, tokens = torch.zeros(()), 0
    answers = [
        (one, worth) for group in groups() for one, worth in zip(group.trajectories, group.advantages, strict=True)
    ]
    for one, worth in answers:
        of_answer = torch.zeros(())
        for state, scored in as_sampled(one, Generator()):
            logprobs = state_logprobs(lm, state)
            for k in scored:
                of_answer = of_answer + logprobs[len(one.prompt_ids) + k, one.token_ids[k]]
        tokens += len(one.token_ids)
        total = total - worth * (of_answer / len(one.token_ids) if normalizer == "sequence" else of_answer)
    norm = {"token": tokens, "sequence": len(answers), "constant": len(answers) * LONGEST}[normalizer]
    lm.model.zero_grad()
    (total / norm).backward()
    return gradient(lm)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_where_the_policy_is_the_old_one_every_level_has_the_policy_gradient(level, normalizer):
    lm = small_lm(scale=3.0)
    loss, grad, watched = packed(lm, algorithm("dipo", level=level, normalizer=normalizer), groups())
    expected = policy_gradient(lm, normalizer)
    assert_same((loss, grad), (loss, expected))
    assert watched["clipped"] == 0


def test_a_ratio_of_a_step_is_the_product_of_its_tokens():
    lm = small_lm(scale=3.0)
    old, _ = shifts("dipo")
    worth = [w for group in groups() for w in group.advantages]
    every = [one for some in ANSWERS for one in some]
    lm.model.zero_grad()
    total = torch.zeros(())
    for sample, one in enumerate(every):
        for state, scored in as_sampled(one, Generator()):
            logprobs = state_logprobs(lm, state)
            own = [(logprobs[len(one.prompt_ids) + k, one.token_ids[k]], old[sample, k]) for k in scored]
            of_step = torch.stack([logprob - (logprob.detach() + shift) for logprob, shift in own]).sum()
            total = total + surrogate(of_step, worth[sample], 0.2, 0.28)
    loss = total / sum(len(one.token_ids) for one in every)
    loss.backward()
    theirs = loss.item(), gradient(lm)
    assert_same(packed(lm, algorithm("dipo", level="step"), groups(), old)[:2], theirs)


@pytest.mark.parametrize("row_tokens", [1, 60, 400])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_packed_rows_equal_the_published_expansion(shift, row_tokens):
    lm = small_lm(scale=3.0)
    old = shift * shifts("dipo")[0]
    ours = packed(lm, algorithm("dipo"), groups(), old, row_tokens=row_tokens)
    every = [one for some in ANSWERS for one in some]
    rows = expand(every, length=24, block_size=BLOCK, mask_id=MASK, pad_id=PAD)
    assert rows.token_ids.shape == (len(every) * BLOCK, 48)
    logprobs = expanded_logprobs(lm, rows)
    before = logprobs.detach().clone()
    for r, sample in enumerate(rows.sample.tolist()):
        start = len(every[sample].prompt_ids)
        count = len(every[sample].token_ids)
        before[r, start : start + count] += old[sample, :count]
    worth = torch.tensor([w for group in groups() for w in group.advantages])[rows.sample]
    lm.model.zero_grad()
    loss = dipo_sum(logprobs, before, worth, rows.scored, 0.2, 0.28) / sum(len(one.token_ids) for one in every)
    loss.backward()
    assert_same(ours[:2], (loss.item(), gradient(lm)))


def test_the_log_prob_of_a_scored_token_is_that_of_the_state_that_revealed_it():
    lm = small_lm()
    every = [one for some in ANSWERS for one in some] + [answer([], 8, seed=9)]
    for one, found in zip(every, trajectory_logprobs(lm, every), strict=True):
        for state, scored in as_sampled(one, Generator()):
            logprobs = state_logprobs(lm, state)
            for k in scored:
                assert found[k] == pytest.approx(logprobs[len(one.prompt_ids) + k, one.token_ids[k]].item(), abs=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_an_importance_weight_counts_like_a_larger_advantage(level):
    lm, weights = small_lm(scale=3.0), torch.linspace(0.5, 2.0, 9)
    worth = iter(weights.tolist())
    larger = [Group(group.trajectories, [a * next(worth) for a in group.advantages]) for group in groups()]
    objective = algorithm("dipo", level=level)
    assert_same(packed(lm, objective, groups(), correction=weights)[:2], packed(lm, objective, larger)[:2])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("nats", [-100.0, 100.0])
def test_tokens_far_from_the_old_policy_and_the_reference_have_a_finite_loss_and_gradient(level, nats):
    lm = small_lm(scale=3.0)
    far = torch.full((9, 10), nats)
    for kl in ("k2", "k3"):
        loss, grad, watched = packed(lm, algorithm("dipo", level=level, beta=0.1, kl=kl), groups(), -far, far)
        assert torch.isfinite(grad).all()
        assert abs(loss) < 1e5
        assert watched["ratio"] < 1.001 * exp(10.0)


def test_a_ratio_is_itself_up_to_ten_nats_and_beyond_has_no_gradient():
    log_ratio = torch.tensor([-500.0, -9.0, 9.0, 500.0], requires_grad=True)
    ratio_of(log_ratio).sum().backward()
    assert ratio_of(log_ratio).tolist() == pytest.approx([exp(-10), exp(-9), exp(9), exp(10)])
    assert log_ratio.grad.tolist() == pytest.approx([0, exp(-9), exp(9), 0])
    assert corrections(torch.tensor([500.0, -500.0]), torch.zeros(2), 2.0).tolist() == pytest.approx([2, exp(-10)])


def test_on_policy_k2_has_the_gradient_of_the_reverse_divergence_and_k3_that_of_the_forward_one():
    """Over all tokens of a small vocabulary, each as often as the policy takes it."""
    logits = torch.tensor([0.3, -1.2, 2.0, 0.5], requires_grad=True)
    reference = torch.tensor([0.0, 3.0, -1.0, -2.0]).log_softmax(0)
    logprobs = logits.log_softmax(0)

    def slope(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def estimated(divergence):
        return slope((logprobs.exp().detach() * divergence(reference - logprobs)).sum())

    reverse = slope((logprobs.exp() * (logprobs - reference)).sum())
    forward = slope((reference.exp() * (reference - logprobs)).sum())
    torch.testing.assert_close(estimated(KL["k1"]), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(estimated(KL["k2"]), reverse)
    torch.testing.assert_close(estimated(KL["k3"]), forward)
    assert torch.nn.functional.cosine_similarity(reverse, forward, dim=0) < 0.9


def test_a_mistyped_choice_is_answered_with_the_right_one():
    for change, meant in [
        ({"level": "tokn"}, "token"),
        ({"kl": "k4"}, "k3"),
        ({"advantage": "normalized"}, "normalised"),
    ]:
        with pytest.raises(DirlError, match=meant):
            algorithm("dipo", **change)


def test_only_the_true_trace_counts_as_exact():
    exact = {path.stem for path in ALGO.glob("*.yaml") if algorithm(path.stem).is_exact}
    assert exact == {"dipo", "dr_grpo", "grpo", "gspo"}
    assert algorithm("dipo").views == Trace()


def test_advantages_of_a_group():
    rewards = torch.tensor([1.0, 0.0, 0.5])
    for name, by_hand in [("normalised", grouped), ("mean_only", centred), ("leave_one_out", against_the_others)]:
        assert torch.allclose(ADVANTAGES[name](rewards), torch.tensor(by_hand(rewards.tolist())))
        assert ADVANTAGES[name](torch.tensor([0.3, 0.3])).tolist() == [0.0, 0.0]
    assert ADVANTAGES["leave_one_out"](torch.tensor([1.0])).tolist() == [0.0]


def test_rewards_that_differ_by_rounding_teach_nothing():
    rounded = torch.tensor([0.5, 0.5 + 2e-7, 0.5, 0.5])
    assert ADVANTAGES["normalised"](rounded).abs().max() < 0.01
    assert not has_signal(rounded.tolist(), [False] * 4, "reward")
    assert ADVANTAGES["normalised"](torch.tensor([1.0, 0.0])).tolist() == [1.0, -1.0]
