"""Every algorithm against its formula written out: one forward a state, one term a token, no packing."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp, inf, log
from statistics import mean, stdev

import pytest
import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.states import Trace
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rl.advantages import ADVANTAGES, AdvantageEstimator, GroupRewards, has_signal
from dirl_cli.rl.batch import TrajectoryGroup
from dirl_cli.rl.corrections import Correction
from dirl_cli.rl.objective import KL, NORMALIZERS, Objective
from dirl_cli.rl.units import LEVELS, ratio_of
from dirl_cli.rl.update import mean_metrics, self_normalised_weights
from dirl_cli.training.logprobs import LogprobModel, trajectory_logprobs
from dirl_cli.types import HELD, Trajectory
from tests.helpers.algorithms import ALGORITHMS, algorithm
from tests.helpers.answers import (
    ANSWERS,
    BLOCK,
    HINTED,
    LONGEST,
    REWARDS,
    TOKENS,
    answer,
    assert_same,
    gradient,
    packed,
)
from tests.helpers.small import MASK, PAD, small_lm
from tests.helpers.whole_batch import objective_rows
from tests.reference.expanded import dipo_sum, expand, expanded_logprobs
from tests.reference.objectives import (
    FORMULAS,
    algorithm_loss,
    as_sampled,
    centred,
    leave_one_out,
    normalised,
    policy_gradient_loss,
    softmax_contrast,
    state_logprobs,
    surrogate,
)

FEWER_STEPS = {"agrpo": 3, "egspo": 2}  # than the answers written by hand have


def for_short_answers(name: str, **changed) -> Objective:
    """An algorithm that does on short answers what it does on long ones."""
    if name in FEWER_STEPS:
        changed["views"] = {"steps": FEWER_STEPS[name]}
    return algorithm(name, **changed)


def groups(advantage: str = "normalised", answers: Sequence[Sequence[Trajectory]] = ANSWERS) -> list[TrajectoryGroup]:
    worth = ADVANTAGES[advantage]
    return [TrajectoryGroup(a, worth(torch.tensor(r)).tolist()) for a, r in zip(answers, REWARDS, strict=True)]


def by_formula(
    name: str,
    lm: DiffusionLM,
    old: Tensor,
    reference: Tensor,
    beta: float,
    train_tail: bool,
    answers: Sequence[Sequence[Trajectory]] = ANSWERS,
) -> tuple[float, Tensor]:
    """Loss and gradient of an algorithm as its paper writes it, on the answers written by hand."""
    rewarded = list(zip(answers, REWARDS, strict=True))
    generator = Generator().manual_seed(8)  # which masks a trained token of every answer
    loss = algorithm_loss(name, lm, rewarded, old, reference, beta, train_tail, LONGEST, generator)
    return loss_and_gradient(lm, loss)


def loss_and_gradient(lm: DiffusionLM, loss: Tensor) -> tuple[float, Tensor]:
    lm.model.zero_grad()
    loss.backward()
    return loss.item(), gradient(lm)


def shifts(name: str) -> tuple[Tensor, Tensor]:
    """Old and reference log-probs beside the present ones: on either side of the clip, so that some are clipped."""
    generator = torch.Generator().manual_seed(1)
    size = {"bgpo": 1.5, "coupled_grpo": 0.75, "egspo": 0.6}.get(name, min(1.5 * FORMULAS[name].clip_low, 0.3))
    old = size * (torch.randn(9, 1, generator=generator) + 0.3 * torch.randn(9, 10, generator=generator))
    return old, 0.3 * torch.randn(9, 10, generator=generator)


def test_every_algorithm_has_a_formula_here():
    assert sorted(FORMULAS) == ALGORITHMS


@pytest.mark.parametrize(("beta", "train_tail"), [(0.0, True), (0.5, False)])
@pytest.mark.parametrize("name", FORMULAS)
def test_an_algorithm_equals_its_formula_in_loss_and_gradient(name, beta, train_tail):
    lm = small_lm(scale=3.0)
    if name in ("opd", "opsd"):  # which are nothing else
        beta = beta or 1.0
    objective = for_short_answers(name, beta=beta)
    old, reference = shifts(name)
    loss, grad, watched = packed(
        lm, objective, groups(objective.advantage), old, reference, row_tokens=64, train_tail=train_tail
    )
    if "clipped" in watched:
        assert 0.05 < watched["clipped"] / watched["total_weight"] < 0.95  # both branches of the minimum are met
    assert_same((loss, grad), by_formula(name, lm, old, reference, beta, train_tail))


@pytest.mark.parametrize("name", FORMULAS)
def test_held_tokens_are_in_no_term_no_ratio_and_no_length_of_any_algorithm(name):
    lm = small_lm(scale=3.0)
    objective = for_short_answers(name, beta=0.5)
    old, reference = shifts(name)
    hinted = groups(objective.advantage, HINTED)
    loss, grad, _ = packed(lm, objective, hinted, old, reference, row_tokens=64, train_tail=False)
    assert_same((loss, grad), by_formula(name, lm, old, reference, 0.5, False, HINTED))

    # Whatever is made of a held token's log-prob, such as by another old policy, changes nothing.
    moved = old.clone()
    for sample, one in enumerate(one for group in HINTED for one in group):
        for k, step in enumerate(one.reveal_step):
            if step == HELD:
                moved[sample, k] += 5
    assert packed(lm, objective, hinted, moved, reference, row_tokens=64, train_tail=False)[0] == loss


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("level", [level for level in LEVELS if level != "answer"])
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
        for state, scored, _ in as_sampled(one, TOKENS, Generator()):
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
        for state, scored, _ in as_sampled(one, TOKENS, Generator()):
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


@pytest.mark.parametrize("name", ALGORITHMS)
def test_how_rows_are_cut_and_padded_changes_nothing(name):
    lm, objective = small_lm(scale=3.0), for_short_answers(name, beta=0.1)
    old, reference = shifts(name)
    whole = packed(lm, objective, groups(), old, reference, row_tokens=400, rows_each=100)
    cut = packed(lm, objective, groups(), old, reference, row_tokens=30, padding=5)
    assert_same(cut[:2], whole[:2])


def test_nothing_is_learned_from_answers_that_did_not_stop_where_they_are_masked():
    lm = small_lm(scale=3.0)
    masked = packed(lm, algorithm("grpo", mask_overlong=True), groups())
    worth = iter([advantage for group in groups() for advantage in group.advantages])
    without = [
        TrajectoryGroup(
            group.trajectories,
            [next(worth) * (one.stop_reason == "stop") for one in group.trajectories],
        )
        for group in groups()
    ]
    assert 0 < sum(one.stop_reason == "length" for group in groups() for one in group.trajectories) < 9
    assert_same(masked[:2], packed(lm, algorithm("grpo"), without)[:2])
    by_token = packed(lm, algorithm("dipo", mask_overlong=True), groups())[2]
    assert by_token["total_weight"] == pytest.approx(1)  # of the tokens that are learned from


def test_a_step_of_overlong_answers_alone_has_metrics_and_no_gradient():
    lm = small_lm(scale=3.0)
    overlong = [TrajectoryGroup([replace(ANSWERS[0][0], stop_reason="length")], [1.0])]
    loss, grad, watched = packed(lm, algorithm("dipo", mask_overlong=True), overlong)
    assert (loss, grad.norm()) == (0, 0)
    assert mean_metrics([watched | {"loss": loss, "skipped": 0.0}])["entropy"] == 0


def test_the_dual_clip_bounds_what_a_bad_answer_costs():
    objective = algorithm("dipo", dual_clip=3.0)
    ratio, advantage = torch.tensor([0.5, 2.0, 9.0, 9.0]), torch.tensor([-1.0, -1.0, -1.0, 1.0])
    loss, is_clipped = objective.clipped_loss(ratio, advantage)
    assert loss.tolist() == pytest.approx([0.8, 2.0, 3.0, -1.28])
    assert is_clipped.tolist() == [True, False, True, True]


def test_an_entropy_bonus_is_the_entropys_own_gradient():
    lm = small_lm(scale=3.0)
    plain, rewarded = (
        packed(lm, algorithm("dipo"), groups()),
        packed(lm, algorithm("dipo", entropy_bonus=0.3), groups()),
    )
    rows, lengths = objective_rows(groups(), algorithm("dipo"), TOKENS, PAD, 96, True, Generator())
    lm.model.zero_grad()
    _, entropy, _ = LogprobModel(lm.model, lm.unsampled_ids)(rows)
    (entropy.sum() / sum(lengths)).backward()
    torch.testing.assert_close(rewarded[1], plain[1] - 0.3 * gradient(lm), atol=1e-6, rtol=1e-4)
    assert rewarded[0] == pytest.approx(plain[0] - 0.3 * plain[2]["entropy"])


def test_answers_weigh_in_their_group_by_their_ratios_of_which_none_counts_above_the_cap():
    log_ratios = torch.tensor([0.0, 1.0, 50.0, 0.3, 0.3])
    weights = self_normalised_weights(log_ratios, [3, 2], cap=5.0)
    by_hand = [1.0, exp(1.0), 5.0]
    assert weights.tolist() == pytest.approx([3 * one / sum(by_hand) for one in by_hand] + [1.0, 1.0])


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


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        ("spg", {"clip_low": 0.2}, "algo.clip_low=0.2 clips a ratio, and algo.surrogate=bounds takes none"),
        ("wd1", {"clip_high": 0.2}, "algo.surrogate=likelihood takes none: give algo.clip_high=inf"),
        ("opd", {"dual_clip": 3.0}, "algo.dual_clip=3 clips a ratio"),
        ("stabledrl", {"clip_low": 0.2}, "algo.clip_low=0.2 clips a ratio"),
        ("dipo", {"upper_power": 2.0}, "algo.upper_power is of algo.surrogate=bounds"),
        ("dipo", {"surrogate": "bounds", "clip_low": inf, "clip_high": inf}, "wants .algo.upper_power"),
    ],
)
def test_what_a_surrogate_does_not_read_is_refused(name, changed, sentence):
    with pytest.raises(DirlError, match=sentence):
        algorithm(name, **changed)


def test_only_the_true_trace_counts_as_exact():
    exact = {name for name in ALGORITHMS if algorithm(name).is_exact}
    assert exact == {"agrpo", "dipo", "dr_grpo", "egspo", "grpo", "gspo", "opd", "opsd", "rspo"}
    assert algorithm("dipo").views == Trace()


def test_advantages_of_a_group():
    rewards = torch.tensor([1.0, 0.0, 0.5])
    for name, by_hand in [("normalised", normalised), ("mean_only", centred), ("leave_one_out", leave_one_out)]:
        assert torch.allclose(ADVANTAGES[name](rewards), torch.tensor(by_hand(rewards.tolist())))
        assert ADVANTAGES[name](torch.tensor([0.3, 0.3])).tolist() == [0.0, 0.0]
    assert ADVANTAGES["leave_one_out"](torch.tensor([1.0])).tolist() == [0.0]


def estimated(rule: str, rewards: list[list[float]], clip: float = inf, negative_weight: float = 1.0, **more):
    """Advantages of groups whose rewards are one part each, or of the parts and tokens given."""
    parts = more.get("parts") or [[[reward] for reward in group] for group in rewards]
    tokens = more.get("tokens") or [[1] * len(group) for group in rewards]
    groups = [
        GroupRewards(torch.tensor(total), torch.tensor(part), torch.tensor(count))
        for total, part, count in zip(rewards, parts, tokens, strict=True)
    ]
    weights = more.get("weights") or {"accuracy": 1.0}
    return [values.tolist() for values in AdvantageEstimator(rule, clip, negative_weight, weights)(groups)]


def test_a_softmax_contrast_raises_the_good_and_lowers_the_bad_by_as_much():
    assert torch.allclose(
        ADVANTAGES["softmax_contrast"](torch.tensor([1.0, 0.0, 0.5])), torch.tensor(softmax_contrast([1.0, 0.0, 0.5]))
    )
    assert ADVANTAGES["softmax_contrast"](torch.tensor([0.3, 0.3])).tolist() == [0.0, 0.0]


def test_the_best_of_a_group_alone_count_and_none_where_all_are_alike():
    assert estimated("best", [[1.0, 0.0, 1.0, 0.5], [0.3, 0.3]]) == [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0]]
    assert estimated("best", [[1.0, 1.0 - 1e-9, 0.0]]) == [[1.0, 1.0, 0.0]], "rewards that differ by rounding"


def test_what_is_not_the_best_need_not_be_laid_out():
    """But for the normaliser, which then counts the tokens of what is learned from."""
    lm, objective = small_lm(scale=3.0), algorithm("raft")
    assert objective.passes_over and not algorithm("raft", beta=0.1).passes_over and not algorithm("wd1").passes_over
    everything = groups("best")
    some = []
    for group in everything:
        kept = [i for i, advantage in enumerate(group.advantages) if advantage]
        some.append(TrajectoryGroup([group.trajectories[i] for i in kept], [1.0] * len(kept)))
    tokens = [sum(len(one.token_ids) for group in part for one in group.trajectories) for part in (everything, some)]
    loss, grad, _ = packed(lm, objective, everything)
    of_the_best = packed(lm, objective, some)
    share = tokens[1] / tokens[0]
    assert share < 1 and of_the_best[0] * share == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(of_the_best[1] * share, grad, atol=1e-6)


def test_advantages_are_bounded_and_the_negative_ones_weighted():
    assert estimated("mean_only", [[4.0, 0.0, 2.0]], clip=1.5) == [[1.5, -1.5, 0.0]]
    assert estimated("mean_only", [[4.0, 0.0, 2.0]], negative_weight=0.5) == [[2.0, -1.0, 0.0]]


def test_batch_normalised_advantages_have_mean_0_and_spread_1_over_the_steps_tokens():
    rewards, tokens = [[1.0, 0.0, 0.0], [3.0, 1.0]], [[5, 1, 2], [4, 8]]
    found = [value for group in estimated("batch_normalised", rewards, tokens=tokens) for value in group]
    centred_rewards = [value for group in rewards for value in centred(group)]
    per_token = [value for value, count in zip(centred_rewards, [5, 1, 2, 4, 8], strict=True) for _ in range(count)]
    by_hand = [(value - mean(per_token)) / stdev(per_token) for value in centred_rewards]
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_rewards_normalised_one_by_one_do_not_drown_in_a_larger_one():
    parts = [[[1.0, 500.0], [0.0, 100.0], [0.0, 900.0]]]
    found = estimated("each_normalised", [[501.0, 100.0, 900.0]], parts=parts, weights={"accuracy": 1.0, "length": 0.5})
    accuracy, length = [1.0, 0.0, 0.0], [500.0, 100.0, 900.0]
    summed = [
        (a - mean(accuracy)) / (stdev(accuracy) + 1e-4) + 0.5 * (b - mean(length)) / (stdev(length) + 1e-4)
        for a, b in zip(accuracy, length, strict=True)
    ]
    assert found[0] == pytest.approx([one / (stdev(summed) + 1e-4) for one in summed], rel=1e-4)
    assert found[0][0] > 0 > found[0][1]  # right, though of medium length


def weighed(rows_of: list[float], **settings):
    """Weights and cuts of three tokens, the first two of one answer, with these log-ratios."""
    rows, _ = objective_rows([TrajectoryGroup([answer([5] * 8, 4, seed=1)], [1.0])], algorithm("dipo"), TOKENS, PAD, 96,
                             True, Generator())  # fmt: skip
    weights, is_cut = Correction(**settings).weights(rows, torch.tensor(rows_of), torch.zeros(4))
    return weights.tolist(), is_cut.tolist()


def test_importance_weights_are_truncated_or_masked_at_the_level_of_a_token_or_an_answer():
    ratios = [log(4.0), log(0.25), 0.0, log(1.5)]
    assert weighed(ratios, cap=2.0)[0] == pytest.approx([2.0, 0.25, 1.0, 1.5])
    assert weighed(ratios, cap=2.0)[1] == [True, False, False, False]
    assert weighed(ratios, cap=2.0, floor=0.5, method="mask")[0] == pytest.approx([0.0, 0.0, 1.0, 1.5])
    assert weighed(ratios, cap=2.0, level="answer")[0] == pytest.approx([1.5] * 4)  # the product
    assert weighed(ratios, cap=2.0, level="sequence")[0] == pytest.approx([1.5**0.25] * 4)  # the geometric mean
    assert weighed([500.0, -500.0, 0.0, 0.0], cap=2.0)[0] == pytest.approx([2, exp(-10), 1, 1])


def test_rewards_that_differ_by_rounding_teach_nothing():
    rounded = torch.tensor([0.5, 0.5 + 2e-7, 0.5, 0.5])
    assert ADVANTAGES["normalised"](rounded).abs().max() < 0.01
    assert not has_signal(rounded.tolist(), [False] * 4, "reward")
    assert ADVANTAGES["normalised"](torch.tensor([1.0, 0.0])).tolist() == [1.0, -1.0]
