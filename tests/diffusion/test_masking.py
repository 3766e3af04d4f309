"""Masking schedules: what they hide, how often, and what it counts."""

import pytest
import torch

from dirl_cli.diffusion.masking import (
    Band,
    Complementary,
    CosineRate,
    CountPerBlock,
    PerBlock,
    PerSample,
    Stratified,
    example,
    noised_rows,
)

BLOCK = torch.tensor([2, 2, 3, 3, 3, 3, 4, 4, 4, 4])  # an answer that begins inside block 2
SCHEDULES = [PerBlock(), PerSample(), Band(0.3, 0.8), CosineRate(), Stratified(), Complementary(), CountPerBlock()]
EXACT = [PerBlock(), PerSample(), Band(0.3, 0.8), Stratified(), Complementary()]


def draws(masking, n: int):
    generator = torch.Generator().manual_seed(0)
    return [masking(BLOCK, generator) for _ in range(n)]


@pytest.mark.parametrize("masking", SCHEDULES, ids=lambda m: type(m).__name__)
def test_every_draw_hides_something(masking):
    for masked, weight in draws(masking, 200):
        assert masked.shape == weight.shape
        assert masked.shape[1] == len(BLOCK)
        assert masked.any()


@pytest.mark.parametrize("masking", EXACT, ids=lambda m: type(m).__name__)
def test_each_answer_token_counts_once_in_expectation(masking):
    for block in (BLOCK, BLOCK[:1]):  # a short answer too, where a token is often hidden because none else is
        generator = torch.Generator().manual_seed(0)
        drawn = (masking(block, generator) for _ in range(8000))
        counts = torch.stack([(masked * weight).sum(0) for masked, weight in drawn])
        assert counts.mean(0).tolist() == pytest.approx([1.0] * len(block), abs=0.12)


def test_one_rate_a_sample_gives_equal_weights_and_one_rate_a_block_does_not():
    (_, per_sample), (_, per_block) = draws(PerSample(), 1)[0], draws(PerBlock(), 1)[0]
    assert per_sample.unique().numel() == 1
    assert per_block.unique().numel() == 3


def test_a_band_keeps_its_rates():
    rates = torch.stack([1 / weight for _, weight in draws(Band(0.3, 0.8), 300)])
    assert rates.min() >= 0.3
    assert rates.max() <= 0.8


def test_stratified_rates_fall_one_in_each_third():
    for _, weight in draws(Stratified(), 50):
        assert sorted((3 / weight[0, [0, 2, 6]] - 0.01).int().tolist()) == [0, 1, 2]


def test_complementary_views_hide_every_token_once():
    for masked, _ in draws(Complementary(), 50):
        assert (masked.sum(0) == 1).all()


def test_count_hides_between_one_and_all_of_a_block_evenly():
    hidden = torch.stack([masked[0, 2:6].sum() for masked, _ in draws(CountPerBlock(), 4000)])
    assert torch.bincount(hidden, minlength=5)[1:] / 4000 == pytest.approx(torch.full((4,), 0.25), abs=0.03)
    assert all(masked[0, :2].any() and masked[0, 6:].any() for masked, _ in draws(CountPerBlock(), 50))


def test_cosine_favours_heavily_masked_states():
    rates = torch.stack([1 / weight[0, 0] for _, weight in draws(CosineRate(), 2000)])
    assert rates.mean() == pytest.approx(2 / torch.pi, abs=0.03)


def test_demonstrations_are_padded_to_whole_blocks_and_their_padding_is_trained():
    one = example([7, 8, 9, 10, 11], [False, False, True, True, True], 4, pad_id=0)
    assert one.token_ids.tolist() == [7, 8, 9, 10, 11, 0, 0, 0]
    assert one.trained.tolist() == [False, False, True, True, True, True, True, True]


def test_the_same_generator_gives_the_same_rows():
    demonstrations = [example(list(range(5, 5 + n)), [i > 3 for i in range(n)], 4, 0) for n in (9, 14)]

    def rows(seed):
        return noised_rows(demonstrations, PerBlock(), 4, 99, 0, 64, torch.Generator().manual_seed(seed))

    (a, answer_tokens), (b, _), (c, _) = rows(1), rows(1), rows(2)
    assert answer_tokens == 8 + 12
    assert torch.equal(a.token_ids, b.token_ids)
    assert a.token_ids.tolist() != c.token_ids.tolist()
