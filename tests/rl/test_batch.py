"""Sharing a prompt, splitting, padding and packing change how much is computed, never what."""

from dataclasses import replace

import pytest
import torch

from dirl_cli.diffusion.layout import SHARED, common_blocks, join_strips, pack
from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.rl.advantages import normalised
from dirl_cli.rl.answer_strips import fitting, joined_length
from dirl_cli.rl.batch import TrajectoryGroup, reward_shares, steps_of_blocks
from tests.helpers.algorithms import algorithm
from tests.helpers.answers import ANSWERS, BLOCK, EIGHT, REWARDS, SIX, TOKENS, answer, assert_same, packed, with_hint
from tests.helpers.small import MASK, PAD, small_lm
from tests.helpers.whole_batch import objective_rows

GROUPS = [TrajectoryGroup(a, normalised(torch.tensor(r)).tolist()) for a, r in zip(ANSWERS, REWARDS, strict=True)]
ALONE = [
    TrajectoryGroup([one], [worth])
    for group in GROUPS
    for one, worth in zip(group.trajectories, group.advantages, strict=True)
]
OLD = 0.3 * torch.randn(9, 10, generator=torch.Generator().manual_seed(2))


def rows_of(groups: list[TrajectoryGroup], row_tokens: int):
    return objective_rows(groups, algorithm("dipo"), TOKENS, PAD, row_tokens, True, torch.Generator())[0]


@pytest.mark.parametrize("row_tokens", [1, 40, 80, 1000])  # each answer alone, some of a group, all of it, everything
@pytest.mark.parametrize(("name", "level"), [("dipo", "token"), ("dipo", "step"), ("gspo", "sequence")])
def test_sharing_the_prompt_among_a_group_changes_nothing(name, level, row_tokens):
    lm, objective = small_lm(scale=3.0), algorithm(name, level=level, clip_low=0.2, clip_high=0.28)
    assert_same(packed(lm, objective, GROUPS, OLD, row_tokens=row_tokens)[:2], packed(lm, objective, ALONE, OLD)[:2])


def test_a_masked_answer_shares_its_prompt_where_that_is_whole():
    lm, objective = small_lm(scale=3.0), algorithm("diffu_grpo", views={"prompt_rate": 0.0})
    assert_same(packed(lm, objective, GROUPS, OLD)[:2], packed(lm, objective, ALONE, OLD)[:2])


def test_full_prompt_blocks_are_laid_out_once_a_group():
    group = TrajectoryGroup([answer(EIGHT, 4, seed=s, steps=1) for s in range(3)], [0.0] * 3)
    rows = rows_of([group], row_tokens=100)
    assert rows.num_tokens == 8 + 3 * 4  # the prompt, and each answer's one noised block
    assert (rows.sequence[rows.view == 0] == SHARED).all()
    apart = [TrajectoryGroup([one], [0.0]) for one in group.trajectories]
    assert rows_of(apart, row_tokens=100).num_tokens == 3 * (8 + 4)


def test_the_rest_of_a_prompt_is_repeated_in_each_answer():
    group = TrajectoryGroup([answer(SIX, 2, seed=s, steps=1) for s in range(3)], [0.0] * 3)
    assert rows_of([group], row_tokens=100).num_tokens == 4 + 3 * 4


def test_a_group_too_long_for_a_row_repeats_its_prompt_in_each():
    strips = [trajectory_strip(answer(EIGHT, 4, seed=s, steps=1), BLOCK, MASK) for s in range(5)]
    assert [len(run) for run in fitting(strips, 16, BLOCK)] == [2, 2, 1]  # 8 for the prompt and 4 an answer
    assert [len(run) for run in fitting(strips, 28, BLOCK)] == [5]
    assert [len(run) for run in fitting(strips, 1, BLOCK)] == [1] * 5
    assert joined_length(strips, BLOCK) == len(join_strips(strips, BLOCK)) == 28


def test_answers_that_begin_alike_share_that_too():
    first, second = (answer(EIGHT, 8, seed=s, steps=1) for s in (0, 1))
    twin = replace(second, token_ids=first.token_ids[:4] + second.token_ids[4:])
    strips = [trajectory_strip(one, BLOCK, MASK) for one in (first, twin)]
    assert common_blocks(strips, BLOCK) == 12
    lm, objective = small_lm(scale=3.0), algorithm("dipo")
    assert_same(
        packed(lm, objective, [TrajectoryGroup([first, twin], [1.0, -0.5])], OLD)[:2],
        packed(lm, objective, [TrajectoryGroup([first], [1.0]), TrajectoryGroup([twin], [-0.5])], OLD)[:2],
    )


def test_the_very_same_answer_twice_counts_twice():
    lm, objective, one = small_lm(scale=3.0), algorithm("dipo"), answer(SIX, 6, seed=0)
    twice = packed(lm, objective, [TrajectoryGroup([one, one], [1.0, 1.0])])
    assert_same(twice[:2], packed(lm, objective, [TrajectoryGroup([one], [1.0])])[:2])  # the mean of two that are equal


@pytest.mark.parametrize("name", ["dipo", "grpo", "gspo", "espo", "unigrpo"])
def test_micro_batches_and_padding_change_neither_loss_nor_gradient(name):
    lm, objective = small_lm(scale=3.0), algorithm(name)
    at_once = packed(lm, objective, GROUPS, row_tokens=50, rows_each=100)
    for options in ({"rows_each": 1}, {"rows_each": 3}, {"rows_each": 2, "padding": 5}, {"row_tokens": 1000}):
        again = packed(lm, objective, GROUPS, **({"row_tokens": 50} | options))
        assert_same(again[:2], at_once[:2])
        assert again[2] == pytest.approx(at_once[2], abs=1e-5)


def test_the_order_of_groups_and_answers_changes_nothing():
    lm, objective = small_lm(scale=3.0), algorithm("grpo")
    turned = [TrajectoryGroup(group.trajectories[::-1], group.advantages[::-1]) for group in GROUPS[::-1]]
    assert_same(packed(lm, objective, turned)[:2], packed(lm, objective, GROUPS)[:2])


def test_every_scored_token_knows_its_answer_and_what_the_sampler_thought_of_it():
    rows = rows_of(GROUPS, row_tokens=50)
    every = [one for some in ANSWERS for one in some]
    worth = [a for group in GROUPS for a in group.advantages]
    place = rows.at_targets(rows.position)
    seen = set()
    for i, sample in enumerate(rows.extras["sample"].tolist()):
        one, k = every[sample], int(place[i]) - len(every[sample].prompt_ids)
        assert rows.targets[i] == one.token_ids[k]
        assert rows.extras["sampler_logprobs"][i] == pytest.approx(one.logprobs[k])
        assert rows.extras["advantage"][i] == pytest.approx(worth[sample])
        assert rows.extras["length"][i] == len(one.token_ids)
        seen.add((sample, k))
    assert len(seen) == len(place) == sum(len(one.token_ids) for one in every)


def test_what_follows_the_stop_token_is_context_and_not_loss():
    one = answer(EIGHT, 8, seed=0, stop_at=5)
    rows, lengths = objective_rows(
        [TrajectoryGroup([one], [1.0])], algorithm("dipo"), TOKENS, PAD, 100, False, torch.Generator()
    )
    assert lengths == [6]
    place = rows.at_targets(rows.position) - 8
    assert torch.equal(rows.weight, (place < 6).float())
    assert (rows.extras["length"] == 6).all()


def test_held_tokens_are_not_scored_and_count_in_no_length():
    group = TrajectoryGroup([with_hint(answer(SIX, 10, seed=0), {2, 3, 4, 5, 8})], [1.0])
    rows, lengths = objective_rows([group], algorithm("dipo"), TOKENS, PAD, 100, True, torch.Generator())
    assert lengths == [5]
    assert sorted((rows.at_targets(rows.position) - 6).tolist()) == [0, 1, 6, 7, 9]
    assert (rows.extras["length"] == 5).all()


def test_a_step_earns_what_it_revealed_and_a_block_that_was_held_earns_nothing():
    one = replace(answer(SIX, 10, seed=0), reveal_step=[1, 2, 0, 0, 0, 0, 2, 1, 0, 1])  # blocks of 2, 4 and 4
    assert steps_of_blocks(one, BLOCK) == [2, 0, 2]
    assert reward_shares(one, [3.0, 4.0, 5.0], BLOCK) == [0, 3.0, 0, 0, 0, 0, 5.0, 0, 0, 0]
    assert reward_shares(one, [1.0, 2.0, 3.0, 4.0], BLOCK) == [1.0, 2.0, 0, 0, 0, 0, 4.0, 1.5, 0, 1.5]


def test_rows_of_one_token_budget_hold_strips_of_several_groups():
    strips = [trajectory_strip(one, BLOCK, MASK) for some in ANSWERS for one in some]
    rows = pack(strips, 200, BLOCK, PAD)
    assert len(rows.token_ids) < len(strips)
    assert rows.num_tokens == sum(map(len, strips))
