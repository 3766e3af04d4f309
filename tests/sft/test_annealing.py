"""The way from a causal model to a block-diffusion model."""

from itertools import permutations, product

import pytest
import torch

from dirl_cli.data.order import generator
from dirl_cli.diffusion.masking import CountPerBlock, PerBlock, PerSample, example
from dirl_cli.errors import DirlError
from dirl_cli.sft.annealing import Annealing, Thinned, thinned
from dirl_cli.sft.batches import Noise
from dirl_cli.training.logprobs import LogprobModel
from tests.helpers.small import small_lm

FINAL = Noise(CountPerBlock(), 4, 49, 0, 64)
BY_AND_BY = Annealing((1, 2), share=0.5, masked=0.5, causal_weight=0.1)
EIGHT = example(range(1, 9), [False] * 3 + [True] * 5, 4, 0)


def test_blocks_grow_in_equal_parts_and_end_at_the_models():
    sizes = [BY_AND_BY.noise(FINAL, step / 8).block_size for step in range(8)]
    assert sizes == [1, 1, 2, 2, 4, 4, 4, 4]


def test_without_annealing_the_noise_is_the_same_from_the_first_step():
    assert Annealing((), 0.0, 1.0, 0.0).noise(FINAL, 0.0) is FINAL


def test_masks_alone_may_be_annealed():
    noise = Annealing((), 1.0, 0.5, 0.0).noise(FINAL, 0.5)
    assert (noise.block_size, noise.masking.share) == (4, 0.75)


def test_a_thinned_schedule_counts_each_token_as_often_as_before():
    """Mean weights of 4,000 draws: per block, a token's expected weight is 1, thinned or not."""
    block = torch.arange(40) // 4
    thinned = Thinned(PerBlock(), 0.5)
    draws = [thinned(block, generator(i)) for i in range(4000)]
    expected = torch.stack([(masked * weight).sum(0) for masked, weight in draws]).mean(0)
    assert expected.mean().item() == pytest.approx(1.0, abs=0.02)
    hidden = torch.stack([masked.float().mean() for masked, _ in draws]).mean()
    assert hidden.item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("many", [1, 2, 4])
def test_each_token_of_a_short_answer_counts_once_thinned_or_not(many, share):
    """Every mask that the published rule draws at one rate, and every outcome of its thinning."""
    rate, none_hidden = 0.3, 0.7**many
    weight = torch.full((1, many), 1 / (rate + none_hidden / many))  # as `hide` has it
    expected = torch.zeros(many)
    for hidden in product([True, False], repeat=many):
        masked = torch.tensor([hidden])
        count = int(masked.sum())
        if count == 0:
            continue
        chance = rate**count * (1 - rate) ** (many - count) + (none_hidden / many if count == 1 else 0.0)
        for lots, probability in outcomes(many, share):
            stays, counts = thinned(masked, weight, torch.tensor([lots]), share)
            assert stays.any()
            expected += chance * probability * (stays * counts)[0]
    assert expected.tolist() == pytest.approx([1.0] * many, abs=1e-5)


def outcomes(many: int, share: float):
    """Each way in which lots fall below the share or above it, and above it each order, with its probability."""
    for below in product([True, False], repeat=many):
        above = [k for k in range(many) if not below[k]]
        orders = list(permutations(above))
        probability = share ** (many - len(above)) * (1 - share) ** len(above) / len(orders)
        for order in orders:
            lots = [share / 2] * many
            for rank, k in enumerate(order):
                lots[k] = share + (1 - share) * (rank + 0.5) / many
            yield lots, probability


@pytest.mark.parametrize(("many", "share"), [(1, 0.5), (2, 0.5), (4, 0.1)])
def test_short_answers_count_once_under_a_schedule_too(many, share):
    block, schedule = torch.zeros(many, dtype=torch.long), Thinned(PerSample(), share)
    random = generator(0)
    draws = [schedule(block, random) for _ in range(10_000)]
    counted = torch.stack([(masked * weight).sum() / many for masked, weight in draws])
    assert counted.mean().item() == pytest.approx(1.0, abs=4 * counted.std().item() / 100)


def test_a_thinned_view_always_hides_something():
    thinned = Thinned(CountPerBlock(), 0.01)
    assert all(thinned(torch.tensor([3]), generator(i))[0].any() for i in range(50))


def test_the_causal_rows_score_each_answer_token_from_the_one_before_it_alone():
    """Against the causal model by hand: the same weights under a causal mask."""
    [rows] = BY_AND_BY.causal_rows([EIGHT], FINAL)
    assert rows.block_size == 1
    assert rows.targets.tolist() == [4, 5, 6, 7, 8]
    assert rows.weight.tolist() == pytest.approx([0.1] * 5)
    lm = small_lm()
    logprobs, *_ = LogprobModel(lm.model)(rows)
    logits = lm.model(torch.arange(1, 9)[None]).logits[0]
    expected = logits.log_softmax(-1)[torch.arange(2, 7), torch.arange(4, 9)]
    assert logprobs.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_without_weight_there_are_no_causal_rows():
    assert Annealing((), 0.0, 1.0, 0.0).causal_rows([EIGHT], FINAL) == []


@pytest.mark.parametrize("sizes", [(3,), (1, 8)])
def test_sizes_that_lead_nowhere_are_refused(sizes):
    with pytest.raises(DirlError, match="each must divide the next"):
        Annealing(sizes, 0.5, 1.0, 0.0).check(4)
