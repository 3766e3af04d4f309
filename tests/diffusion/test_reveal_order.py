"""Sampled answers in the order in which they were revealed, beside the published rules written out."""

from dataclasses import replace
from random import Random

import pytest
import torch

from dirl_cli.data.order import generator
from dirl_cli.diffusion.masking import example, noised_rows, noised_strip
from dirl_cli.diffusion.reveal_order import TraceWindows
from dirl_cli.diffusion.states import BlockSpec, MergedTrace, Trace
from dirl_cli.types import HELD, Trajectory
from tests.reference.reveal_order import chances, path_loss, states_of, windows_of

MASK = 49
EVERY = TraceWindows(2, states="every", emphasis=0.0, counted="window")
DRAWN = replace(EVERY, states="drawn", emphasis=8.0, counted="masked")
BLOCK = torch.tensor([3, 3, 3, 3, 3, 3, 3, 3])
ORDER = torch.tensor([9, 4, 7, 7, 12, 5, 4, 13])  # of one block's tokens: steps 3 0 2 2 4 1 0 5


def answer(rng: Random, prompt: int, tokens: int, block_size: int) -> Trajectory:
    """An answer whose blocks are revealed in random orders, several tokens a step or one."""
    reveal_step: list[int] = []
    while len(reveal_step) < tokens:
        size = block_size - (prompt + len(reveal_step)) % block_size
        steps = [rng.randint(1, size) for _ in range(size)]
        ranks = sorted(set(steps))
        reveal_step += [ranks.index(step) + 1 for step in steps]
    ids = [rng.randrange(2, 40) for _ in range(prompt + len(reveal_step))]
    return Trajectory(ids[:prompt], ids[prompt:], reveal_step, block_size=block_size)


def as_example(trajectory: Trajectory, block_size: int):
    order = trajectory.revealed_at(trajectory.block_size)
    ids = [*trajectory.prompt_ids, *trajectory.token_ids]
    given = [HELD] * len(trajectory.prompt_ids)
    trained = [False] * len(given) + [step != HELD for step in order]
    return example(ids, trained, block_size, 0, [*given, *order])


def places(values: torch.Tensor) -> set[int]:
    return set(values.nonzero().flatten().tolist())


def test_forwards_are_counted_over_all_blocks_of_an_answer():
    trajectory = Trajectory([5, 6], [7] * 6, [2, 1, 1, HELD, 3, 1], block_size=4)
    assert trajectory.revealed_at(4) == [2, 1, 3, HELD, 4, 3]


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_every_window_of_a_block_is_scored_once_where_it_and_what_is_later_is_hidden(window):
    masked, weight = replace(EVERY, window=window).along(ORDER)(BLOCK, generator(0))
    states = [(places(hidden), places(counted)) for hidden, counted in zip(masked, weight, strict=True)]
    assert states == states_of(ORDER.tolist(), window)
    assert weight.sum(0).tolist() == [1.0] * 8


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_answer_has_the_states_in_which_reinforcement_scores_the_merged_trace(steps):
    rng = Random(steps)
    for prompt in (3, 4, 6):
        trajectory = answer(rng, prompt, 20, 4)
        expected = MergedTrace(steps)(trajectory, BlockSpec(4, MASK), generator(0))
        strip = noised_strip(as_example(trajectory, 4), replace(EVERY, window=steps), 4, MASK, generator(0))
        for name, value in vars(expected).items():
            assert torch.equal(getattr(strip, name), value), name


def test_an_answer_in_smaller_blocks_is_cut_in_larger_ones_by_its_forwards():
    """Blocks of 2 in two steps each are a block of 4 in four steps, of which two are a window."""
    trajectory = Trajectory([5, 6, 5, 6], [11, 12, 13, 14], [2, 1, 1, 2], block_size=2)
    strip = noised_strip(as_example(trajectory, 4), EVERY, 4, MASK, generator(0))
    assert strip.token_ids.tolist() == [5, 6, 5, 6, MASK, MASK, MASK, MASK, 11, 12, MASK, MASK]
    assert strip.targets.tolist() == [11, 12, 13, 14]

    # In its own blocks a window is one of them, and in single tokens nothing is left to choose.
    strip = noised_strip(as_example(trajectory, 2), EVERY, 2, MASK, generator(0))
    assert strip.token_ids.tolist() == [5, 6, 5, 6, 11, 12, MASK, MASK, MASK, MASK]
    assert (noised_strip(as_example(trajectory, 1), EVERY, 1, MASK, generator(0)).token_ids == MASK).sum() == 4


def test_what_fills_an_answer_up_to_larger_blocks_makes_no_further_state():
    trajectory = Trajectory([5, 6], [11, 12, 13, 14], [1, 2, 1, 1], block_size=2)
    strip = noised_strip(as_example(trajectory, 4), replace(EVERY, window=1), 4, MASK, generator(0))
    assert strip.token_ids[4:].tolist() == [5, 6, MASK, MASK, MASK, MASK, MASK, MASK, 5, 6, 11, MASK]
    assert strip.targets.tolist() == [11, 13, 14, 0, 0, 12]


def test_a_held_token_is_shown_in_every_state():
    trajectory = Trajectory([5, 6], [11, 12, 13, 14, 15, 16], [1, HELD, 2, 1, HELD, 1], block_size=4)
    one = as_example(trajectory, 4)
    strip = noised_strip(one, replace(EVERY, window=1), 4, MASK, generator(0))
    expected = Trace()(trajectory, BlockSpec(4, MASK), generator(0))
    assert torch.equal(strip.token_ids, expected.token_ids) and torch.equal(strip.targets, expected.targets)


@pytest.mark.parametrize("emphasis", [0.0, 1.0, 8.0])
def test_a_state_is_drawn_as_often_as_what_it_hides_says(emphasis):
    rule = replace(DRAWN, emphasis=emphasis).along(ORDER)
    draws = generator(1)
    hidden = torch.tensor([int(rule(BLOCK, draws)[0].sum()) for _ in range(4000)])
    expected = chances(ORDER.tolist(), 2, emphasis)
    for (tokens, _), chance in zip(states_of(ORDER.tolist(), 2), expected, strict=True):
        assert (hidden == len(tokens)).float().mean().item() == pytest.approx(chance, abs=0.03)


def test_every_block_draws_a_state_of_its_own():
    rng = Random(0)
    block = torch.arange(40) // 8 + 2
    order = torch.tensor([rng.randint(1, 30) for _ in range(40)])
    rule = replace(DRAWN, emphasis=0.0, window=1).along(order)
    for seed in range(50):
        masked, weight = rule(block, generator(seed))
        assert masked.shape == (1, 40) and torch.equal(weight > 0, masked)
        for first in range(0, 40, 8):
            own = order[first : first + 8].tolist()
            assert places(masked[0, first : first + 8]) in [tokens for tokens, _ in states_of(own, 1)]
    assert torch.equal(rule(block, generator(7))[0], rule(block, generator(7))[0])


def test_the_path_counts_what_is_revealed_sooner_more_as_its_loss_is_written():
    losses = torch.tensor([0.5, 2.0, 0.25, 1.0, 3.0, 0.125, 4.0, 1.5])
    masked, weight = replace(EVERY, counted="path").along(ORDER)(BLOCK, generator(0))
    groups = windows_of(ORDER.tolist(), 2)
    for first, (hidden, weights) in enumerate(zip(masked, weight, strict=True)):
        tokens = int(hidden.sum())
        weights = weights * len(groups)  # of the mean over the states
        assert (weights * losses).sum() / tokens == pytest.approx(path_loss(losses.tolist(), groups[first:]))
        assert weights.sum() == pytest.approx(tokens)
    assert weight[0, 1] == weight[0, 5] > weight[0, 2] > weight[0, 7] > 0


@pytest.mark.parametrize("counted", ["masked", "path"])
def test_over_every_state_a_token_counts_what_it_does_in_the_mean_of_drawn_ones(counted):
    """A block of three windows and one of a single window, which is hidden in the first state alone."""
    block = torch.tensor([3, 3, 3, 3, 3, 3, 4, 4])
    order = torch.tensor([1, 2, 3, 4, 5, 6, 7, 7])
    weight = replace(EVERY, counted=counted).along(order)(block, generator(0))[1].sum(0)
    if counted == "masked":
        assert torch.allclose(weight, torch.tensor([1, 1, 2, 2, 3, 3, 3, 3]) / 3)
    rule = replace(DRAWN, counted=counted, emphasis=0.0).along(order)
    draws = generator(1)
    mean = sum(rule(block, draws)[1].sum(0) for _ in range(2000)) / 2000
    assert torch.allclose(weight, mean, atol=0.08)


def test_the_path_of_several_blocks_is_that_of_each():
    block = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    rule = replace(DRAWN, counted="path", window=1, emphasis=1.0)
    for seed in range(20):
        masked, weight = rule.along(ORDER)(block, generator(seed))
        for own in (slice(0, 4), slice(4, 8)):
            hidden = masked[0, own]
            alone = [step for step, is_hidden in zip(ORDER[own].tolist(), hidden.tolist(), strict=True) if is_hidden]
            losses = [1.0 + i for i in range(len(alone))]
            expected = path_loss(losses, windows_of(alone, 1)) * len(alone)
            assert (weight[0, own][hidden] * torch.tensor(losses)).sum() == pytest.approx(expected)


def test_without_an_order_a_token_is_a_step_from_left_to_right():
    masked, _ = replace(EVERY, window=4).along(None)(BLOCK, generator(0))
    assert masked.int().tolist() == [[1] * 8, [0] * 4 + [1] * 4]


def test_rows_of_the_same_seed_are_the_same_and_of_another_not():
    trajectories = [answer(Random(i), 4, 24, 8) for i in range(6)]
    examples = [as_example(one, 8) for one in trajectories]
    rule = replace(DRAWN, emphasis=1.0)

    def rows(seed: int):
        return noised_rows(examples, rule, 8, MASK, 0, 64, generator(seed))[0].token_ids

    assert torch.equal(rows(0), rows(0)) and not torch.equal(rows(0), rows(1))
