"""The likelihood of given texts, against one forward for each state, and against all texts that there are."""

from itertools import product
from math import exp, sqrt

import pytest
import torch

from dirl_cli.training.text_likelihood import MaskDraws, Text, evidence_bound, left_to_right, spans, windows
from tests.helpers.small import small_lm
from tests.reference import likelihood as slow
from tests.reference.enumerated import toy

# A prompt that ends inside a block, an answer that does, two answers with what was said between them, and no prompt.
TEXTS = [
    Text([3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [False] * 5 + [True] * 6),
    Text([3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [False, True, True, False, False, True, False, True, True, True]),
    Text([20, 21, 22, 23, 24], [True] * 5),
]
ROW = 64


def generators(texts, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]


def test_left_to_right_is_what_one_forward_for_each_token_gives():
    lm = small_lm()
    for text, scores in zip(TEXTS, left_to_right(lm, TEXTS, ROW), strict=True):
        assert len(scores.logprobs) == sum(text.scored)
        assert scores.total == pytest.approx(slow.left_to_right(lm, text.token_ids, text.scored), abs=1e-4)


def test_rows_of_any_length_give_the_same():
    lm = small_lm()
    short, long = left_to_right(lm, TEXTS, 8), left_to_right(lm, TEXTS, 4096)
    for a, b in zip(short, long, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    masks = MaskDraws(3, 4)
    short, long = (evidence_bound(lm, TEXTS, masks, generators(TEXTS), row) for row in (8, 4096))
    for a, b in zip(short, long, strict=True):
        assert a.draws == pytest.approx(b.draws, abs=1e-4)


def test_a_text_is_cut_where_a_row_is_full():
    scored = torch.ones(2, 12, dtype=torch.bool)  # two views of three blocks of four
    assert spans(scored, 4, 100) == [(0, 3)]
    assert spans(scored, 4, 20) == [(0, 2), (2, 3)]  # 4 clean + 16 noised, then 8 clean + 8 noised
    assert spans(scored, 4, 1) == [(0, 1), (1, 2), (2, 3)]


def test_greedy_tokens_are_told_from_others():
    lm = small_lm()
    prompt = [3, 4, 5]
    text = list(prompt)
    for position in range(3, 9):
        start = position // 4 * 4
        text.append(int(slow.block_logprobs(lm, text, start, set())[position - start].argmax()))
    other = [*text[:-1], (text[-1] + 1) % 40]
    flags = [False] * 3 + [True] * 6
    greedy, changed = left_to_right(lm, [Text(text, flags), Text(other, flags)], ROW)
    assert greedy.likeliest == [True] * 6
    assert changed.likeliest == [True] * 5 + [False]


@pytest.mark.parametrize("block_size", [2, 3])
def test_the_probabilities_of_all_texts_from_left_to_right_sum_to_one(block_size):
    lm = toy(block_size, usable=3)
    texts = [Text([1, *answer], [False] + [True] * 4) for answer in product(range(3), repeat=4)]
    total = sum(exp(scores.total) for scores in left_to_right(lm, texts, ROW))
    assert total == pytest.approx(1, abs=1e-5)


def test_the_elbo_is_unbiased_and_a_bound_of_the_random_order():
    lm = toy(3, usable=3)
    texts = [Text([1, *answer], [False] + [True] * 4) for answer in [(0, 1, 2, 0), (2, 2, 1, 0), (1, 0, 0, 2)]]
    masks = MaskDraws(draws=200, rates=2)  # fewer rates than a run has tokens, and more than another has
    for text, bound in zip(texts, evidence_bound(lm, texts, masks, generators(texts), 256), strict=True):
        exact = slow.elbo(lm, text.token_ids, text.scored)
        assert bound.standard_error < 0.35
        assert abs(bound.mean - exact) < 4 * bound.standard_error
        assert exact <= slow.any_order(lm, text.token_ids, text.scored) + 1e-6


def test_the_standard_error_is_that_of_the_mean_over_draws():
    lm = small_lm()
    repeated = []
    for seed in range(40):
        [bound] = evidence_bound(lm, TEXTS[:1], MaskDraws(8, 4), generators(TEXTS[:1], seed), 512)
        repeated.append((bound.mean, bound.standard_error))
    means = torch.tensor([mean for mean, _ in repeated])
    told = sqrt(sum(error**2 for _, error in repeated) / len(repeated))
    assert told == pytest.approx(float(means.std()), rel=0.35)


def test_with_a_rate_for_each_token_of_a_block_every_number_of_masks_counts_once():
    """A block alone, of which draws have no other choice where one or all of two tokens are masked."""
    lm = small_lm(block_size=2)
    text = Text([3, 4, 5, 6], [False, False, True, True])
    [bound] = evidence_bound(lm, [text], MaskDraws(5, 2), generators([text]), ROW)
    assert bound.rate_tokens == [5 * 1, 5 * 2]
    both = slow.block_logprobs(lm, text.token_ids, 2, {2, 3})
    assert bound.rate_logprobs[1] / 5 == pytest.approx(float(both[0, 5] + both[1, 6]), abs=1e-4)


def test_the_elbo_of_several_answers_is_that_of_each_given_all_before_it():
    lm = small_lm()
    text = TEXTS[1]
    [bound] = evidence_bound(lm, [text], MaskDraws(60, 4), generators([text]), 256)
    assert abs(bound.mean - slow.elbo(lm, text.token_ids, text.scored)) < 4 * bound.standard_error


def test_windows_without_anything_scored_are_left_out():
    text = Text([3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [False] * 8 + [True] * 2)
    assert windows(text, 8, 4) == [Text([5, 6, 7, 8, 9, 10, 11, 12], [False] * 6 + [True] * 2)]
    assert windows(Text([3, 4], [False, False]), 8, 4) == []


def test_a_text_with_nothing_scored_has_zeros():
    lm = small_lm()
    texts = [Text([3, 4, 5], [False] * 3), TEXTS[0]]
    nothing, something = evidence_bound(lm, texts, MaskDraws(2, 4), generators(texts), ROW)
    assert (nothing.draws, nothing.rate_tokens, nothing.mean) == ([0, 0], [0] * 4, 0)
    assert something.mean < 0
    assert left_to_right(lm, texts, ROW)[0].total == 0
