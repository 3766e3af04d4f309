"""Decoding strategies on blocks small enough to check by eye."""

import pytest
import torch

from dirl_cli.diffusion.sampling import Candidates
from dirl_cli.diffusion.unmasking import (
    State,
    find_strategy,
    low_confidence_static,
    quota,
    reveal,
    threshold_at,
    threshold_table,
)
from dirl_cli.errors import DirlError
from dirl_cli.types import Decoding
from tests.reference.sampling import scheduled

NONE = torch.tensor([])


def state(confidence, masked=(1, 1, 1, 1), owed=1, threshold=0.9, earlier=(-1, -1, -1, -1)) -> State:
    """One block; the entropies of its positions are 0.1, 0.2, 0.3 and 0.4, the margins 0.2, 0.8, 0.4 and 0.6."""
    masked = torch.tensor([masked], dtype=torch.bool)
    candidates = Candidates(NONE, NONE, torch.tensor([confidence])[masked], NONE)
    candidates.__dict__["entropy"] = torch.tensor([[0.1, 0.2, 0.3, 0.4]])[masked]  # as if computed already
    candidates.__dict__["margin"] = torch.tensor([[0.2, 0.8, 0.4, 0.6]])[masked]
    earlier = torch.tensor([earlier], dtype=torch.float)
    return State(masked, candidates, torch.tensor([owed]), threshold, lowest_threshold=0.6, earlier=earlier)


def revealed(name: str, s: State) -> list[int]:
    return reveal(find_strategy(name), s)[0].int().tolist()


def test_sequential_takes_the_leftmost_masked():
    assert revealed("sequential", state([0.1, 0.2, 0.3, 0.9], masked=[0, 1, 1, 1], owed=2)) == [0, 1, 1, 0]


def test_static_takes_the_most_confident_masked():
    assert revealed("low_confidence_static", state([0.99, 0.2, 0.5, 0.4], masked=[0, 1, 1, 1], owed=2)) == [0, 0, 1, 1]


def test_dynamic_takes_all_above_the_threshold_or_what_it_owes():
    assert revealed("low_confidence_dynamic", state([0.95, 0.2, 0.91, 0.92])) == [1, 0, 1, 1]
    assert revealed("low_confidence_dynamic", state([0.5, 0.2, 0.3, 0.6], owed=2)) == [1, 0, 0, 1]
    assert revealed("low_confidence_dynamic", state([0.5, 0.2, 0.3, 0.95], owed=2)) == [1, 0, 0, 1]


def test_the_margin_is_what_a_threshold_may_be_of():
    assert revealed("probability_margin", state([0.0] * 4, threshold=0.5)) == [0, 1, 0, 1]
    assert revealed("probability_margin", state([0.0] * 4, threshold=0.5, owed=3)) == [0, 1, 1, 1]
    assert revealed("probability_margin", state([0.0] * 4, threshold=1.0, masked=[1, 0, 1, 0])) == [0, 0, 1, 0]


def test_a_blocks_own_threshold_begins_with_its_surest_token():
    assert revealed("bounded_adaptive", state([0.95, 0.2, 0.91, 0.89])) == [1, 0, 1, 0]  # at most 0.9
    assert revealed("bounded_adaptive", state([0.7, 0.8, 0.8, 0.1])) == [0, 1, 1, 0]  # the largest, twice
    assert revealed("bounded_adaptive", state([0.5, 0.2, 0.55, 0.1])) == [0, 0, 1, 0]  # at least 0.6, or the best


def test_then_it_is_the_mean_confidence_of_what_the_block_has_revealed():
    def after(*earlier: float) -> list[int]:
        left = state([0.0, 0.0, 0.74, 0.76], masked=[0, 0, 1, 1], earlier=[*earlier, -1, -1])
        return revealed("bounded_adaptive", left)

    assert after(0.7, 0.8) == [0, 0, 0, 1]  # 0.75
    assert after(0.7, -1) == [0, 0, 1, 1]  # 0.7, the other token being the prompt's
    assert after(0.1, 0.2) == [0, 0, 1, 1]  # at least 0.6
    assert after(1.0, 1.0) == [0, 0, 0, 1]  # at most 0.9, which nothing reaches: the best


@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_threshold_may_go_by_step_and_place(block_size, steps):
    decoding = Decoding(threshold=0.5, threshold_by_step=-0.3, threshold_by_position=0.4, denoising_steps=steps)
    table = threshold_table(decoding, block_size)
    for step in range(1, 7):
        expected = scheduled(decoding, step, block_size)
        torch.testing.assert_close(threshold_at(decoding, table, torch.tensor([step]))[0], expected)
    assert threshold_at(Decoding(threshold=0.5), table, torch.tensor([2])) == 0.5


def test_where_a_threshold_goes_by_place_each_token_has_its_own():
    thresholds = torch.tensor([[0.5, 0.6, 0.7, 0.8]])
    assert revealed("low_confidence_dynamic", state([0.55, 0.55, 0.75, 0.75], threshold=thresholds)) == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"threshold_by_step": 0.2}, "goes from 0.9 to 1.1 by threshold_by_step and threshold_by_position"),
        ({"threshold_by_step": -0.5, "threshold_by_position": -0.5}, "goes from -0.1 to 0.9 by"),
        ({"threshold_by_position": -0.1, "strategy": "low_confidence_static"}, "are of decoding=dynamic, whose"),
        ({"strategy": "bounded_adaptive", "threshold": 0.5}, "is to be from decoding.lowest_threshold=0.6 to 1"),
        ({"strategy": "bounded_adaptive", "threshold": 1.5}, "is to be from decoding.lowest_threshold=0.6 to 1"),
    ],
)
def test_thresholds_out_of_bounds_are_told_in_a_sentence(settings, sentence):
    with pytest.raises(DirlError, match=sentence):
        Decoding(**settings)
    Decoding(threshold_by_step=-0.3, threshold_by_position=0.1)  # up to 1.0


def test_entropy_bounded_takes_the_longest_prefix_within_the_bound_and_at_least_one():
    assert revealed("entropy_bounded", state([0.0] * 4, threshold=0.35)) == [1, 1, 0, 0]
    assert revealed("entropy_bounded", state([0.0] * 4, threshold=0.05, masked=[0, 1, 1, 1])) == [0, 1, 0, 0]


def test_a_tie_goes_to_the_left():
    assert revealed("low_confidence_static", state([0.5, 0.5, 0.5, 0.5], owed=2)) == [1, 1, 0, 0]


def test_a_strategy_that_reveals_nothing_or_too_much_is_held_to_the_contract():
    s = state([0.1, 0.2, 0.4, 0.3], masked=[0, 1, 1, 1])
    assert reveal(lambda s: torch.zeros_like(s.masked), s)[0].tolist() == [False, False, True, False]
    assert reveal(lambda s: torch.ones_like(s.masked), s)[0].tolist() == [False, True, True, True]


def test_a_block_without_masks_reveals_nothing():
    assert not reveal(low_confidence_static, state([0.9] * 4, masked=[0, 0, 0, 0])).any()


@pytest.mark.parametrize(
    ("block_size", "steps", "owed"),
    [(4, 4, [1, 1, 1, 1]), (4, 3, [2, 1, 1]), (8, 3, [3, 3, 2]), (4, 1, [4]), (2, 3, [1, 1, 1])],
)
def test_the_steps_together_owe_a_block(block_size, steps, owed):
    assert quota(torch.arange(1, steps + 1), block_size, steps).tolist() == owed


def test_left_open_a_block_has_as_many_steps_as_tokens():
    assert quota(torch.arange(1, 9), 8, None).tolist() == [1] * 8


def test_an_unknown_strategy_is_told_with_its_nearest_name():
    with pytest.raises(DirlError, match="did you mean sequential"):
        find_strategy("sequentail")


def test_a_strategy_may_come_from_the_users_own_module():
    assert find_strategy("dirl_cli.diffusion.unmasking.sequential") is find_strategy("sequential")
    with pytest.raises(DirlError, match=r"no_such\.strategy cannot be imported"):
        find_strategy("no_such.strategy")
