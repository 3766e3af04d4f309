"""Distributions, candidates and the randomness behind them."""

import math

import pytest
import torch

from dirl_cli.diffusion.sampling import (
    chunk_width,
    draw_candidates,
    draw_seed,
    exponential,
    race,
    request_key,
    temper,
    truncate,
)
from tests.reference.sampling import draw

NONE = torch.tensor([], dtype=torch.long)
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
ONE = torch.tensor(1)
SEED = draw_seed(torch.tensor([request_key(0, [1], 0)]), ONE, ONE)  # (1,)


def seeds_of(n: int, seed: int = 0) -> torch.Tensor:
    """The seeds of n positions of an answer."""
    return draw_seed(torch.tensor(request_key(seed, [1], 0)), torch.arange(n), ONE)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic less its mean, in its own standard deviations, over the tokens that are there."""
    expected = counts.sum() * probabilities
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum().item() - 1
    return (statistic.item() - freedom) / math.sqrt(2 * freedom)


def probabilities(logits):
    return logits.softmax(-1)[0].tolist()


def test_ids_that_are_never_sampled_have_no_probability():
    assert probabilities(temper(LOGITS, 1.0, torch.tensor([0, 3])))[0] == 0
    assert probabilities(temper(LOGITS, 0.5, NONE)) == pytest.approx((LOGITS * 2).softmax(-1)[0].tolist())


def test_top_k_keeps_the_k_largest():
    assert [p > 0 for p in probabilities(truncate(LOGITS, 2, 1.0))] == [True, True, False, False]


def test_top_p_keeps_the_fewest_that_reach_it():
    # .644 .237 .087 .032
    assert [p > 0 for p in probabilities(truncate(LOGITS, 0, 0.6))] == [True, False, False, False]
    assert [p > 0 for p in probabilities(truncate(LOGITS, 0, 0.7))] == [True, True, False, False]
    assert [p > 0 for p in probabilities(truncate(LOGITS.flip(-1), 0, 0.7))] == [False, False, True, True]


def test_confidence_is_taken_before_truncation_and_the_log_prob_after():
    drawn = draw_candidates(LOGITS, SEED, 1.0, 1, 1.0, "sampled", NONE)
    assert drawn.tokens.tolist() == [0]
    assert drawn.confidence.item() == pytest.approx(0.6439, abs=1e-4)
    assert drawn.logprobs.item() == 0


def test_the_three_confidences_of_a_known_distribution():
    for name in ("sampled", "max", "entropy"):
        assert draw_candidates(torch.zeros(1, 4), SEED, 1.0, 0, 1.0, name, NONE).confidence.item() == pytest.approx(
            0.25
        )
    seed = next(seed for seed in seeds_of(1000)[:, None] if race(LOGITS.log_softmax(-1), seed).item() == 3)
    unlikely, likeliest = (draw_candidates(LOGITS, seed, 1.0, 0, 1.0, name, NONE) for name in ("sampled", "max"))
    assert unlikely.tokens.item() == likeliest.tokens.item() == 3
    assert unlikely.confidence.item() == pytest.approx(0.0321, abs=1e-4)
    assert likeliest.confidence.item() == pytest.approx(0.6439, abs=1e-4)


def test_the_margin_is_between_the_two_likeliest_before_truncation():
    assert draw_candidates(torch.zeros(1, 4), SEED, 1.0, 0, 1.0, "max", NONE).margin.item() == 0
    ahead = draw_candidates(torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log(), SEED, 1.0, 1, 1.0, "sampled", NONE)
    assert ahead.margin.item() == pytest.approx(0.2)


def test_greedy_takes_the_largest_and_reports_the_models_own_log_prob():
    drawn = draw_candidates(LOGITS, SEED, 0.0, 1, 0.1, "sampled", NONE)
    assert drawn.tokens.item() == 0
    assert drawn.logprobs.item() == pytest.approx(torch.log_softmax(LOGITS, -1)[0, 0].item())


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 40, 335, 1000])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(vocabulary, spread):
    logits = spread * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logprobs = temper(logits, 1.0, torch.arange(1, vocabulary, 7)).log_softmax(-1)
    counts = torch.bincount(race(logprobs.expand(100_000, -1), seeds_of(100_000)), minlength=vocabulary)
    if vocabulary <= 2:
        assert counts.tolist() == [100_000, 0][:vocabulary]
    else:
        assert abs(chi_square(counts, logprobs[0].double().exp())) < 4


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.6, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (1.0, 9, 0.7)]
)
def test_and_as_temperature_top_k_and_top_p_say(temperature, top_k, top_p):
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(0))
    drawn = draw_candidates(logits.expand(50_000, -1), seeds_of(50_000), temperature, top_k, top_p, "sampled", NONE)
    allowed = truncate(logits / temperature, top_k, top_p).double().softmax(-1)[0]
    assert abs(chi_square(torch.bincount(drawn.tokens, minlength=60), allowed)) < 4
    torch.testing.assert_close(drawn.logprobs, allowed.log().float()[drawn.tokens])


def test_draws_of_other_positions_steps_keys_and_chunks_have_nothing_to_do_with_each_other():
    logprobs = torch.zeros(1, 24).log_softmax(-1)  # chunks of 4
    keys = torch.tensor([request_key(0, [1], i) for i in range(100)])
    seeds = draw_seed(keys[:, None, None], torch.arange(20)[:, None], torch.arange(1, 41))
    tokens = race(logprobs.expand(seeds.numel(), -1), seeds.flatten()).view(seeds.shape)
    pairs = {
        "keys": (tokens[1:], tokens[:-1]),
        "positions": (tokens[:, 1:], tokens[:, :-1]),
        "steps": (tokens[..., 1:], tokens[..., :-1]),
        "chunk and token": (tokens // 4, tokens % 4),
    }
    for name, (one, other) in pairs.items():
        sides = (6, 4) if name == "chunk and token" else (24, 24)
        counts = torch.bincount((one * sides[1] + other).flatten(), minlength=sides[0] * sides[1])
        assert abs(chi_square(counts, torch.full((len(counts),), 1 / len(counts), dtype=torch.float64))) < 4, name


def test_the_race_is_the_one_of_plain_python():
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (1, 3, 37, 335):
        logprobs = (2 * torch.randn(20, vocabulary, generator=generator)).log_softmax(-1)
        expected = [draw(row.tolist(), seed) for row, seed in zip(logprobs, seeds_of(20).tolist(), strict=True)]
        assert race(logprobs, seeds_of(20)).tolist() == expected


def test_a_token_without_probability_is_never_drawn():
    logprobs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log()
    assert set(race(logprobs.expand(200, -1), seeds_of(200)).tolist()) == {1, 3}


def test_a_rows_token_depends_on_nothing_beside_it():
    logprobs = torch.randn(30, 335, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    alone = [race(logprobs[i : i + 1], seeds_of(30)[i : i + 1]).item() for i in range(30)]
    assert race(logprobs, seeds_of(30)).tolist() == alone


def test_logits_of_another_rounding_change_close_races_only():
    """In bf16 a cumulative sum over so many tokens changed nearly every draw of so flat a distribution."""
    logits = torch.randn(200, 151_936, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    rounded = (logits + 1e-3 * noise).bfloat16().float()
    tokens = [race(each.log_softmax(-1), seeds_of(200)) for each in (logits, rounded)]
    assert (tokens[0] != tokens[1]).sum() <= 5


def test_random_times_are_exponential_and_never_nothing_or_endless():
    times = exponential(seeds_of(500)[:, None], torch.arange(400))
    assert times.shape == (500, 400)
    assert times.min() > 0
    assert times.max() < 40
    for power, moment in ((1, 1.0), (2, 2.0), (3, 6.0)):
        assert (times**power).mean().item() == pytest.approx(moment, rel=0.03)
    below = [(times < x).double().mean().item() for x in (0.01, 0.5, 1.0, 3.0)]
    assert below == pytest.approx([1 - math.exp(-x) for x in (0.01, 0.5, 1.0, 3.0)], abs=0.003)


def test_a_vocabulary_is_cut_into_about_as_many_chunks_as_a_chunk_has_tokens():
    assert [chunk_width(n) for n in (1, 3, 4, 335, 49_152, 151_936)] == [1, 1, 2, 16, 128, 256]


def test_a_request_key_depends_on_seed_prompt_and_sample():
    keys = {request_key(*arguments) for arguments in ((0, [1, 2], 0), (1, [1, 2], 0), (0, [12], 0), (0, [1, 2], 1))}
    assert len(keys) == 4
    assert all(0 <= key < 2**63 for key in keys)
