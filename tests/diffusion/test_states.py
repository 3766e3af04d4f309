"""In which states each kind of views scores an answer: written out on answers small enough to check by eye."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Generator

from dirl_cli.diffusion.layout import Strip
from dirl_cli.diffusion.states import (
    GAUSS_LEGENDRE,
    AnswerMasked,
    BlockMasks,
    BlockSpec,
    ComplementaryMasks,
    CoupledMasks,
    LeftToRight,
    MergedTrace,
    QuadratureMasks,
    RandomMasks,
    SampledTrace,
    Trace,
)
from dirl_cli.errors import DirlError
from dirl_cli.rl.batch import trained_length
from dirl_cli.types import Trajectory
from tests.helpers.small import MASK

TOKENS = BlockSpec(block_size=4, mask_id=MASK)
M = MASK


def trajectory(prompt: list[int], token_ids: list[int], reveal_step: list[int], stop: int = 1) -> Trajectory:
    return Trajectory(prompt, token_ids, reveal_step, [0.0] * len(token_ids), "stop", stop_token_ids=(stop,))


MIXED = trajectory([10, 11], [20, 21, 22, 23, 24, 25], [2, 1, 1, 3, 2, 1])  # a prompt tail, then a whole block


def shown(strip: Strip) -> list[list[int]]:
    """The strip's tokens a block at a time."""
    return strip.token_ids.view(-1, 4).tolist()


def scored(strip: Strip) -> list[tuple[int, int]]:
    """(token, in which laid-out block) for each scored one."""
    return list(zip(strip.targets.tolist(), (strip.target_index // 4).tolist(), strict=True))


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def test_the_trace_scores_each_token_in_the_state_that_revealed_it():
    strip = Trace()(MIXED, TOKENS, generator())
    assert shown(strip) == [
        [10, 11, 20, 21],  # clean, for the second block to read
        [10, 11, M, M],  # step 1
        [M, M, M, M],
        [10, 11, M, 21],  # step 2
        [22, M, M, 25],
        [22, M, 24, 25],  # step 3, of the second block alone
    ]
    assert scored(strip) == [(21, 1), (22, 2), (25, 2), (20, 3), (24, 4), (23, 5)]
    assert strip.view.view(-1, 4)[:, 0].tolist() == [0, 1, 1, 2, 2, 3]
    assert strip.position.view(-1, 4)[:, 0].tolist() == [0, 0, 4, 0, 4, 4]


def test_merged_steps_are_scored_in_the_state_before_the_first_of_them():
    strip = MergedTrace(steps=2)(MIXED, TOKENS, generator())
    assert shown(strip) == [[10, 11, 20, 21], [10, 11, M, M], [M, M, M, M], [22, M, 24, 25]]
    assert scored(strip) == [(20, 1), (21, 1), (22, 2), (24, 2), (25, 2), (23, 3)]
    assert shown(MergedTrace(steps=1)(MIXED, TOKENS, generator())) == shown(Trace()(MIXED, TOKENS, generator()))


def test_left_to_right_shows_what_stands_before_a_token():
    strip = LeftToRight()(MIXED, TOKENS, generator())
    assert shown(strip) == [
        [10, 11, 20, 21],
        [10, 11, M, M],
        [M, M, M, M],
        [10, 11, 20, M],
        [22, M, M, M],
        [22, 23, M, M],
        [22, 23, 24, M],
    ]
    assert scored(strip) == [(20, 1), (22, 2), (21, 3), (23, 4), (24, 5), (25, 6)]


def test_a_whole_answer_is_masked_in_a_single_copy():
    strip = AnswerMasked(prompt_rate=0.0)(MIXED, TOKENS, generator())
    assert shown(strip) == [[10, 11, M, M], [M, M, M, M]]
    assert scored(strip) == [(20, 0), (21, 0), (22, 1), (23, 1), (24, 1), (25, 1)]
    assert strip.view.tolist() == [0] * 8


def test_a_prompt_is_masked_at_its_rate_and_never_scored():
    one = trajectory([10] * 4000, [20] * 4, [1] * 4)
    strip = AnswerMasked(prompt_rate=0.15)(one, TOKENS, generator())
    assert 0.13 < (strip.token_ids[:4000] == M).float().mean() < 0.17
    assert strip.target_index.tolist() == [4000, 4001, 4002, 4003]


def test_random_masks_score_what_they_hide_at_a_rate_within_the_bounds():
    one = trajectory([10] * 4, [20] * 4000, [1] * 4000)
    rates = set()
    for seed in range(8):
        strip = RandomMasks(low=0.3, high=0.6, draws=1)(one, TOKENS, generator(seed))
        assert (strip.token_ids[strip.target_index] == M).all()
        assert (strip.token_ids == M).sum() == len(strip.target_index)
        assert 0.26 < len(strip.target_index) / 4000 < 0.64
        rates.add(len(strip.target_index))
    assert len(rates) == 8


def test_several_draws_are_averaged():
    one = trajectory([10] * 4, [20] * 4000, [1] * 4000)
    total = [RandomMasks(low=0.5, high=0.5, draws=n)(one, TOKENS, generator()).weight.sum().item() for n in (1, 4)]
    assert total[0] == pytest.approx(total[1], rel=0.1)


def test_an_answer_is_never_left_without_a_scored_token():
    one = trajectory([10, 11, 12], [20], [1])
    strips = [RandomMasks(low=0.0, high=0.1, draws=1)(one, TOKENS, generator(seed)) for seed in range(20)]
    assert all(scored(strip) == [(20, 0)] for strip in strips)


def test_a_mask_and_its_complement_score_each_token_once_weighted_by_their_rates():
    one = trajectory([10] * 6, list(range(20, 34)), [1] * 14)
    strip = ComplementaryMasks(low=0.2, high=0.8)(one, TOKENS, generator(3))
    assert sorted(strip.targets.tolist()) == list(range(20, 34))
    first, second = strip.weight.unique().tolist()
    assert 1 / (2 * first) + 1 / (2 * second) == pytest.approx(1)  # ρ and 1 - ρ
    assert (
        (strip.weight == first)
        == (strip.view[strip.target_index] == strip.view[strip.target_index][strip.weight == first][0])
    ).all()


def mean_weight(views, one: Trajectory, draws: int) -> torch.Tensor:
    """What each answer token counts on average over draws."""
    total = torch.zeros(len(one.token_ids))
    rng = generator()
    for _ in range(draws):
        strip = views(one, TOKENS, rng)
        total.index_add_(0, strip.position[strip.target_index] - len(one.prompt_ids), strip.weight)
    return total / draws


UNLIKELY_LAST = replace(MIXED, logprobs=[-0.1, -0.1, -0.1, -3.0, -0.5, -0.1])  # the token of step 3


def test_sampled_steps_are_scored_as_the_trace_does_and_the_rest_is_not_laid_out():
    strip = SampledTrace(steps=1, choose="most_surprising")(UNLIKELY_LAST, TOKENS, generator())
    assert shown(strip) == [[10, 11, 20, 21], [22, M, 24, 25]]
    assert scored(strip) == [(23, 1)]
    assert strip.weight.tolist() == [5.0]  # of five steps


def test_as_many_steps_as_there_are_make_the_whole_trace():
    for choose in ("uniform", "surprisal", "most_surprising"):
        strip = SampledTrace(steps=5, choose=choose)(UNLIKELY_LAST, TOKENS, generator())
        assert scored(strip) == scored(Trace()(MIXED, TOKENS, generator()))
        assert strip.weight.tolist() == [1.0] * 6


@pytest.mark.parametrize("choose", ["uniform", "surprisal"])
def test_sampled_steps_weigh_each_token_once_on_average(choose):
    weights = mean_weight(SampledTrace(steps=2, choose=choose), UNLIKELY_LAST, 4000)
    assert weights.tolist() == pytest.approx([1.0] * 6, abs=0.08)  # five standard errors


def test_a_step_is_drawn_more_often_for_its_surprisal_and_at_most_weighs_twice_the_uniform_weight():
    rng = generator()
    taken = [SampledTrace(2, "surprisal")(UNLIKELY_LAST, TOKENS, rng) for _ in range(500)]
    unlikely = sum(23 in strip.targets.tolist() for strip in taken)
    assert unlikely > 400  # two of five would be 200
    assert max(strip.weight.max().item() for strip in taken) <= 2 * 5 / 2


def test_several_tokens_from_left_to_right_are_scored_in_one_state():
    strip = LeftToRight(tokens=3)(MIXED, TOKENS, generator())
    assert shown(strip) == [[10, 11, 20, 21], [10, 11, M, M], [M, M, M, M], [22, 23, 24, M]]
    assert scored(strip) == [(20, 1), (21, 1), (22, 2), (23, 2), (24, 2), (25, 3)]


def test_coupled_masks_score_every_token_under_the_whole_mask_and_under_one_of_two():
    one = trajectory([10] * 6, list(range(20, 34)), [1] * 14)
    strip = CoupledMasks(low=0.2, high=0.8)(one, TOKENS, generator(3))
    assert sorted(strip.targets.tolist()) == sorted(2 * list(range(20, 34)))
    view = strip.view[strip.target_index]
    assert strip.weight[view == 1].tolist() == [0.5] * 14
    first, second = strip.weight[view == 2].unique().item(), strip.weight[view == 3].unique().item()
    assert 1 / (2 * first) + 1 / (2 * second) == pytest.approx(1)  # ρ and 1 - ρ


def test_block_masks_hide_some_of_every_block_and_weigh_each_token_once_on_average():
    strip = BlockMasks(draws=3)(MIXED, TOKENS, generator(1))
    hidden = [(block.count(M), weight) for block, weight in zip(shown(strip)[1:], block_weights(strip), strict=True)]
    sizes = [2, 4, 2, 4, 2, 4]  # the first block holds two answer tokens
    assert [weight for _, weight in hidden] == pytest.approx(
        [n / k / 3 for n, (k, _) in zip(sizes, hidden, strict=True)]
    )
    assert mean_weight(BlockMasks(draws=2), MIXED, 3000).tolist() == pytest.approx([1.0] * 6, abs=0.08)


def block_weights(strip: Strip) -> list[float]:
    """The one weight of each noised block's scored tokens."""
    weights: dict[int, set[float]] = {}
    for index, weight in zip((strip.target_index // 4).tolist(), strip.weight.tolist(), strict=True):
        weights.setdefault(index, set()).add(weight)
    assert all(len(values) == 1 for values in weights.values())
    return [weight for _, (weight,) in sorted(weights.items())]


def test_block_masks_take_every_number_of_tokens_equally_often():
    one = trajectory([], list(range(20, 36)), [1] * 16)
    strip = BlockMasks(draws=8)(one, TOKENS, generator())  # 32 blocks, one level of noise in each 32nd
    hidden = Counter(block.count(M) for block in shown(strip) if M in block)
    assert hidden == {1: 8, 2: 8, 3: 8, 4: 8}


def test_quadrature_masks_hide_a_fixed_share_of_the_answer():
    one = trajectory([10] * 4, list(range(20, 40)), [1] * 20)
    strip = QuadratureMasks(nodes=2)(one, TOKENS, generator())
    view = strip.view[strip.target_index]
    assert [(view == 1).sum(), (view == 2).sum()] == [4, 16]  # of 20 at rates 0.21 and 0.79
    assert strip.weight[view == 1].tolist() == pytest.approx([0.5 / 0.2113249] * 4)
    assert strip.weight[view == 2].tolist() == pytest.approx([0.5 / 0.7886751] * 16)
    with pytest.raises(DirlError, match="give 2 or 3"):
        QuadratureMasks(nodes=4)


@pytest.mark.parametrize("nodes", GAUSS_LEGENDRE)
def test_quadrature_is_exact_for_polynomials(nodes):
    for power in range(2 * nodes):
        assert sum(w * t**power for t, w in GAUSS_LEGENDRE[nodes]) == pytest.approx(1 / (power + 1))


@pytest.mark.parametrize(
    "views", [Trace(), MergedTrace(2), LeftToRight(), AnswerMasked(0.0), ComplementaryMasks(0.2, 0.8)], ids=str
)
@pytest.mark.parametrize(("prompt", "answer"), [(3, 1), (0, 4), (4, 4), (1, 7), (5, 3)])
def test_every_answer_token_is_scored_once_wherever_the_prompt_ends(views, prompt, answer):
    one = trajectory([10] * prompt, list(range(20, 20 + answer)), [1 + k % 2 for k in range(answer)])
    strip = views(one, TOKENS, generator())
    assert sorted(strip.targets.tolist()) == one.token_ids
    assert (strip.position[strip.target_index] >= prompt).all()
    assert (strip.token_ids[strip.target_index] == M).all()


def test_a_cut_block_is_refused():
    with pytest.raises(DirlError, match="not whole blocks of 4"):
        Trace()(trajectory([10], [20, 21], [1, 2]), TOKENS, generator())


def test_training_ends_with_the_stop_token():
    assert trained_length(trajectory([], [20, 1, 22, 23], [1] * 4)) == 2
    assert trained_length(trajectory([], [20, 21, 22, 1], [1] * 4)) == 4
    assert trained_length(trajectory([], [20, 21, 22, 23], [1] * 4)) == 4
