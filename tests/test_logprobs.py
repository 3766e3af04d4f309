"""Scoring tokens: chunks, packing and backends change nothing, and slow definitions agree."""

import pytest
import torch
from answers import ANSWERS, BLOCK
from small import MASK, PAD, small_lm

from dirl_cli.diffusion.layout import Rows, pack
from dirl_cli.diffusion.trace import trajectory_strip
from dirl_cli.errors import DirlError
from dirl_cli.models.attention import dense_mask
from dirl_cli.training.logprobs import TokenScorer, score_trajectories
from dirl_cli.types import Decoding

TRAJECTORIES = [one for group in ANSWERS for one in group]


def rows(row_tokens: int = 64) -> Rows:
    return pack([trajectory_strip(one, BLOCK, MASK) for one in TRAJECTORIES], row_tokens, BLOCK, PAD)


def gradient(scorer: TokenScorer, packed: Rows) -> torch.Tensor:
    scorer.zero_grad()
    logprobs, entropy = scorer(packed)
    (logprobs + 0.1 * entropy).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in scorer.model.parameters()])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_change_neither_log_probs_nor_gradients(chunk):
    lm, packed = small_lm(), rows()
    whole, chunked = (TokenScorer(lm.model, lm.unsampled_ids, chunk=size) for size in (10_000, chunk))
    for found, expected in zip(chunked(packed), whole(packed), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    expected = gradient(whole, packed).clone()
    torch.testing.assert_close(gradient(chunked, packed), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decoding", [Decoding(temperature=1.0), Decoding(temperature=0.7, top_k=5, top_p=0.9)])
def test_log_probs_and_entropy_are_those_of_the_full_logits(decoding):
    lm, packed = small_lm(), rows()
    with torch.no_grad():
        mask = dense_mask(packed.coordinates)
        logits = lm.model(packed.token_ids, position_ids=packed.position, attention_mask=mask).logits
        logits = logits.flatten(0, 1)[packed.where].double()
        logits[:, MASK] = -torch.inf
        logits /= decoding.temperature
        own = logits.gather(1, packed.targets[:, None])
        if decoding.top_k:
            logits[logits < logits.topk(decoding.top_k).values[:, -1:]] = -torch.inf
            ordered, places = logits.softmax(-1).sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= decoding.top_p
            logits[torch.zeros_like(beyond).scatter(1, places, beyond)] = -torch.inf
            assert (logits.gather(1, packed.targets[:, None]) == -torch.inf).any()  # some tokens lie outside …
            logits.scatter_(1, packed.targets[:, None], own)  # … and are scored all the same
        logprobs = logits.log_softmax(-1)
        expected = logprobs.gather(1, packed.targets[:, None]).squeeze(1)
        expected_entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)
        found, entropy = TokenScorer(lm.model, lm.unsampled_ids, decoding)(packed)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-4, rtol=0)


def test_the_mask_token_is_in_no_softmax_that_scores_tokens_except_where_it_is_asked_for():
    lm, packed = small_lm(), rows()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[MASK] = 30 * lm.model.get_output_embeddings().weight[:MASK].abs().max()
        without, with_mask = TokenScorer(lm.model, (MASK,))(packed)[0], TokenScorer(lm.model)(packed)[0]
    assert (without >= with_mask).all() and (without > with_mask + 1).any()


@pytest.mark.parametrize("row_tokens", [8, 40, 4096])
def test_packing_changes_no_score(row_tokens):
    lm = small_lm()
    expected = [score_trajectories(lm, [one])[0] for one in TRAJECTORIES]
    found = score_trajectories(lm, TRAJECTORIES, row_tokens=row_tokens, rows_each=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_flex_attention_scores_as_sdpa_does():
    dense, flex = small_lm(), small_lm(attention="flex_attention")
    with torch.no_grad():
        expected, found = (TokenScorer(lm.model, lm.unsampled_ids)(rows()) for lm in (dense, flex))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_flex_attention_cannot_learn_on_a_cpu_and_says_so():
    lm = small_lm(attention="flex_attention")
    with pytest.raises(DirlError, match="attention=flex cannot learn on a CPU: leave it at auto"):
        TokenScorer(lm.model)(rows())


def test_a_temperature_of_zero_is_scored_as_one():
    lm = small_lm()
    assert score_trajectories(lm, TRAJECTORIES, Decoding(temperature=0.0)) == score_trajectories(lm, TRAJECTORIES)
