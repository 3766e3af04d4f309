"""Distributions, candidates and the randomness behind them."""

import pytest
import torch

from dirl_cli.diffusion.sampling import draw_candidates, invert, request_key, temper, truncate, uniform

NONE = torch.tensor([], dtype=torch.long)
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


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
    drawn = draw_candidates(LOGITS, torch.tensor([0.0]), 1.0, 1, 1.0, "sampled", NONE)
    assert drawn.tokens.tolist() == [0]
    assert drawn.confidence.item() == pytest.approx(0.6439, abs=1e-4)
    assert drawn.logprobs.item() == 0


def test_the_three_confidences_of_a_known_distribution():
    u = torch.tensor([0.999])
    for name in ("sampled", "max", "entropy"):
        assert draw_candidates(torch.zeros(1, 4), u, 1.0, 0, 1.0, name, NONE).confidence.item() == pytest.approx(0.25)
    unlikely, likeliest = (draw_candidates(LOGITS, u, 1.0, 0, 1.0, name, NONE) for name in ("sampled", "max"))
    assert unlikely.tokens.item() == likeliest.tokens.item() == 3
    assert unlikely.confidence.item() == pytest.approx(0.0321, abs=1e-4)
    assert likeliest.confidence.item() == pytest.approx(0.6439, abs=1e-4)


def test_greedy_takes_the_largest_and_reports_the_models_own_log_prob():
    drawn = draw_candidates(LOGITS, torch.tensor([0.99]), 0.0, 1, 0.1, "sampled", NONE)
    assert drawn.tokens.item() == 0
    assert drawn.logprobs.item() == pytest.approx(torch.log_softmax(LOGITS, -1)[0, 0].item())


def test_drawing_follows_the_distribution():
    u = uniform(torch.tensor(request_key(0, [1], 0)), torch.arange(20_000), torch.ones(1, dtype=torch.long))
    counts = torch.bincount(invert(LOGITS.softmax(-1).expand(20_000, 4), u), minlength=4) / 20_000
    assert counts.tolist() == pytest.approx(probabilities(LOGITS), abs=0.01)


def test_a_token_without_probability_is_never_drawn():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    tokens = [invert(p, torch.tensor([u])).item() for u in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53)]
    assert set(tokens) == {1, 3}


def test_uniform_numbers_are_uniform_and_unrelated_across_keys_positions_and_steps():
    keys = torch.tensor([request_key(0, [1], i) for i in range(100)])
    u = uniform(keys[:, None, None], torch.arange(20)[None, :, None], torch.arange(1, 9)[None, None])
    assert u.shape == (100, 20, 8)
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.003)
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[..., 1:], u[..., :-1])):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.03


def test_a_request_key_depends_on_seed_prompt_and_sample():
    keys = {request_key(*arguments) for arguments in ((0, [1, 2], 0), (1, [1, 2], 0), (0, [12], 0), (0, [1, 2], 1))}
    assert len(keys) == 4
    assert all(0 <= key < 2**63 for key in keys)
