"""The endless order of examples: exact shares of every source, every example once an epoch, any place alone."""

from collections import Counter
from functools import partial
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dirl_cli.data.order import LONGEST_ROUND, MixtureOrder, generator
from dirl_cli.diffusion.sampling import request_key
from dirl_cli.rl.rollouts import problem_order


def order(sizes, weights, seed=0):
    return MixtureOrder(tuple(sizes), tuple(weights), partial(generator, seed))


def source_of(example, sizes):
    return next(source for source, end in enumerate(accumulate(sizes)) if example < end)


mixes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8)), min_size=1, max_size=4)


@given(mixes, st.integers(0, 2**20), st.integers(0, 30))
def test_every_round_holds_exact_shares(mix, seed, turn):
    sizes, weights = zip(*mix, strict=True)
    total = sum(weights)
    ours = order(sizes, weights, seed)
    drawn = Counter(source_of(ours[place], sizes) for place in range(turn * total, (turn + 1) * total))
    assert [drawn[source] for source in range(len(sizes))] == list(weights)


@given(mixes, st.integers(0, 2**20), st.integers(0, 200))
def test_before_any_place_every_example_of_a_source_came_as_often_or_once_less(mix, seed, place):
    sizes, weights = zip(*mix, strict=True)
    ours = order(sizes, weights, seed)
    seen = Counter(ours[i] for i in range(place))
    first = 0
    for size, drawn, epochs in zip(sizes, ours.counts_before(place), ours.epochs(place), strict=True):
        times = [seen[example] for example in range(first, first + size)]
        assert sum(times) == drawn and max(times) - min(times) <= 1 and epochs == drawn / size
        first += size


@given(mixes, st.integers(0, 2**20), st.integers(0, 10**9))
def test_a_place_far_away_is_computed_alone_and_again(mix, seed, place):
    sizes, weights = zip(*mix, strict=True)
    assert order(sizes, weights, seed)[place] == order(sizes, weights, seed)[place]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (7, 3), (70, 30)])
def test_weights_are_proportions(weights):
    assert [order((100, 100), weights)[place] for place in range(50)] == [
        order((100, 100), (0.7, 0.3))[place] for place in range(50)
    ]


@pytest.mark.parametrize(
    ("weights", "length", "shares"),
    [
        ((0.7, 0.2, 0.1), 10, [7, 2, 1]),
        ((1 / 3, 2 / 3), 3, [1, 2]),
        ((3.14159, 2.71828), LONGEST_ROUND, [536, 464]),  # of 536.1 and 463.9
        ((1.0, 1e-9), LONGEST_ROUND + 1, [LONGEST_ROUND, 1]),  # however small, a weight counts
    ],
)
def test_a_round_is_as_short_as_its_shares_allow(weights, length, shares):
    assert order([5] * len(weights), weights).counts_before(length) == shares


def test_sources_of_the_same_size_are_shuffled_each_in_its_own_way():
    ours = order((50, 50), (1, 1))
    drawn = [ours[place] for place in range(100)]
    assert [i for i in drawn if i < 50] != [i - 50 for i in drawn if i >= 50]


@given(st.integers(1, 40), st.integers(0, 2**20), st.integers(0, 100))
def test_one_source_alone_is_shuffled_by_epoch_and_size(size, seed, place):
    epoch, i = divmod(place, size)
    assert order([size], [5.0], seed)[place] == torch.randperm(size, generator=generator(seed, epoch, size))[i]
    drawn = torch.Generator().manual_seed(request_key(seed, [epoch, size], 0))
    assert problem_order([size], [1.0], seed)[place] == torch.randperm(size, generator=drawn)[i]
