"""Every algorithm against its formula written out: one forward a state, one term a token, no packing."""

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
from dirl_cli.rl.batch import TrajectoryGroup
from dirl_cli.rl.objective import KL, LEVELS, NORMALIZERS, Objective, ratio_of
from dirl_cli.rl.update import corrections
from dirl_cli.training.logprobs import trajectory_logprobs
from tests.helpers.answers import ANSWERS, BLOCK, LONGEST, REWARDS, TOKENS, answer, assert_same, gradient, packed
from tests.helpers.paths import ROOT
from tests.helpers.small import MASK, PAD, small_lm
from tests.reference.expanded import dipo_sum, expand, expanded_logprobs
from tests.reference.objectives import (
    FORMULAS,
    algorithm_loss,
    as_sampled,
    centred,
    leave_one_out,
    normalised,
    policy_gradient_loss,
    state_logprobs,
    surrogate,
)

ALGO = ROOT / "conf" / "algo"


def algorithm(name: str, **changed) -> Objective:
    return build(OmegaConf.merge(OmegaConf.load(ALGO / f"{name}.yaml"), changed))


def groups(advantage: str = "normalised") -> list[TrajectoryGroup]:
    worth = ADVANTAGES[advantage]
    return [TrajectoryGroup(a, worth(torch.tensor(r)).tolist()) for a, r in zip(ANSWERS, REWARDS, strict=True)]


def by_formula(
    name: str, lm: DiffusionLM, old: Tensor, reference: Tensor, beta: float, train_tail: bool
) -> tuple[float, Tensor]:
    """Loss and gradient of an algorithm as its paper writes it, on the answers written by hand."""
    rewarded = list(zip(ANSWERS, REWARDS, strict=True))
    generator = Generator().manual_seed(7)
    loss = algorithm_loss(name, lm, rewarded, old, reference, beta, train_tail, LONGEST, generator)
    return loss_and_gradient(lm, loss)


def loss_and_gradient(lm: DiffusionLM, loss: Tensor) -> tuple[float, Tensor]:
    lm.model.zero_grad()
    loss.backward()
    return loss.item(), gradient(lm)


def shifts(name: str) -> tuple[Tensor, Tensor]:
    """Old and reference log-probs beside the present ones: on either side of the clip, so that some are clipped."""
    generator = torch.Generator().manual_seed(1)
    size = 1.5 * FORMULAS[name].clip_low
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
    assert 0.05 < watched["clipped"] / watched["total_weight"] < 0.95  # both branches of the minimum are met
    assert_same((loss, grad), by_formula(name, lm, old, reference, beta, train_tail))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_where_the_policy_is_the_old_one_every_level_has_the_policy_gradient(level, normalizer):
    lm = small_lm(scale=3.0)
    loss, grad, watched = packed(lm, algorithm("dipo", level=level, normalizer=normalizer), groups())
    answers = [one for group in groups() for one in group.trajectories]
    advantages = [advantage for group in groups() for advantage in group.advantages]
    slow = policy_gradient_loss(lm, answers, advantages, normalizer, LONGEST)
    assert_same((loss, grad), (loss, loss_and_gradient(lm, slow)[1]))
    assert watched["clipped"] == 0


def test_a_ratio_of_a_step_is_the_product_of_its_tokens():
    lm = small_lm(scale=3.0)
    old, _ = shifts("dipo")
    worth = [w for group in groups() for w in group.advantages]
    every = [one for some in ANSWERS for one in some]
    total = torch.zeros(())
    for sample, one in enumerate(every):
        for state, scored in as_sampled(one, TOKENS, Generator()):
            logprobs = state_logprobs(lm, state)
            own = [(logprobs[len(one.prompt_ids) + k, one.token_ids[k]], old[sample, k]) for k in scored]
            of_step = torch.stack([logprob - (logprob.detach() + shift) for logprob, shift in own]).sum()
            total = total + surrogate(of_step, worth[sample], 0.2, 0.28)
    loss = total / sum(len(one.token_ids) for one in every)
    expected = loss_and_gradient(lm, loss)
    assert_same(packed(lm, algorithm("dipo", level="step"), groups(), old)[:2], expected)


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
    loss = dipo_sum(logprobs, before, worth, rows.scored, 0.2, 0.28) / sum(len(one.token_ids) for one in every)
    assert_same(ours[:2], loss_and_gradient(lm, loss))


def test_the_log_prob_of_a_scored_token_is_that_of_the_state_that_revealed_it():
    lm = small_lm()
    every = [one for some in ANSWERS for one in some] + [answer([], 8, seed=9)]
    for one, found in zip(every, trajectory_logprobs(lm, every), strict=True):
        for state, scored in as_sampled(one, TOKENS, Generator()):
            logprobs = state_logprobs(lm, state)
            for k in scored:
                assert found[k] == pytest.approx(logprobs[len(one.prompt_ids) + k, one.token_ids[k]].item(), abs=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_an_importance_weight_counts_like_a_larger_advantage(level):
    lm, weights = small_lm(scale=3.0), torch.linspace(0.5, 2.0, 9)
    worth = iter(weights.tolist())
    larger = [TrajectoryGroup(group.trajectories, [a * next(worth) for a in group.advantages]) for group in groups()]
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
    for name, by_hand in [("normalised", normalised), ("mean_only", centred), ("leave_one_out", leave_one_out)]:
        assert torch.allclose(ADVANTAGES[name](rewards), torch.tensor(by_hand(rewards.tolist())))
        assert ADVANTAGES[name](torch.tensor([0.3, 0.3])).tolist() == [0.0, 0.0]
    assert ADVANTAGES["leave_one_out"](torch.tensor([1.0])).tolist() == [0.0]


def test_rewards_that_differ_by_rounding_teach_nothing():
    rounded = torch.tensor([0.5, 0.5 + 2e-7, 0.5, 0.5])
    assert ADVANTAGES["normalised"](rounded).abs().max() < 0.01
    assert not has_signal(rounded.tolist(), [False] * 4, "reward")
    assert ADVANTAGES["normalised"](torch.tensor([1.0, 0.0])).tolist() == [1.0, -1.0]
