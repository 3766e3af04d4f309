"""How engines are compared on a GPU, tried where the truth is known."""

from dataclasses import replace

import pytest
import torch

from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding
from tests.helpers.divergence import first_divergence
from tests.helpers.small import small_lm
from tests.reference.sampling import greedy_answer

PROMPTS = [[5, 6, 7], [9, 8, 7, 6], [11] * 9, [3]]
STRATEGIES = [
    {"strategy": "sequential"},
    {"strategy": "low_confidence_static"},
    {"strategy": "low_confidence_dynamic"},
    {"threshold_by_step": -0.4, "threshold_by_position": 0.3},
    {"strategy": "probability_margin"},
    {"strategy": "bounded_adaptive", "lowest_threshold": 0.2},
    {"strategy": "entropy_bounded"},
]


@pytest.mark.parametrize("steps", [4, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_native_engine_answers_as_the_slow_loop(strategy, steps):
    lm, decoding = small_lm(), Decoding(denoising_steps=steps, threshold=0.5, max_new_tokens=14, **strategy)
    for prompt, [answer] in zip(PROMPTS, NativeSampler(lm).sample(PROMPTS, 1, decoding), strict=True):
        slow = greedy_answer(lm, prompt, decoding)
        assert first_divergence(lm, slow, answer, decoding) is None
        assert (slow.token_ids, slow.reveal_step) == (answer.token_ids, answer.reveal_step)
        assert slow.logprobs == pytest.approx(answer.logprobs, abs=1e-4)


def test_engines_whose_weights_differ_a_little_part_where_the_margin_is_small():
    decoding = Decoding(threshold=0.5, max_new_tokens=48)
    exact, margins = small_lm(), {}
    for noise in (0.001, 0.3):
        rough = small_lm()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in rough.model.parameters():
                parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
        pairs = [[greedy_answer(lm, prompt, decoding) for lm in (exact, rough)] for prompt in PROMPTS]
        margins[noise] = [found.margin for pair in pairs if (found := first_divergence(exact, *pair, decoding))]
    assert max(margins[0.001], default=0.0) < 0.05
    assert len(margins[0.3]) >= 3 and max(margins[0.3]) > 0.2


def test_a_wrong_token_place_or_number_is_told_with_its_margin():
    lm, static = small_lm(), Decoding(strategy="low_confidence_static", max_new_tokens=4)
    right = greedy_answer(lm, [9, 8, 7, 6], static)
    first, second = right.reveal_step.index(1), right.reveal_step.index(2)

    tokens = list(right.token_ids)
    tokens[first] = (tokens[first] + 1) % 40
    found = first_divergence(lm, right, replace(right, token_ids=tokens), static)
    assert found.decision == f"token {right.token_ids[first]} or {tokens[first]}" and found.margin > 0

    swapped = list(right.reveal_step)
    swapped[first], swapped[second] = 2, 1
    found = first_divergence(lm, right, replace(right, reveal_step=swapped), static)
    assert found.decision == "places" and found.margin > 0

    dynamic = replace(static, strategy="low_confidence_dynamic", threshold=1e-6)
    together = greedy_answer(lm, [9, 8, 7, 6], dynamic)
    assert together.reveal_step == [1, 1, 1, 1]
    found = first_divergence(lm, together, replace(together, reveal_step=[1, 1, 1, 2]), dynamic)
    assert found.decision == "how many" and found.margin > 1
