"""The loss of pairs against its formula written out: one forward a state, no packing."""

from math import exp, log

import pytest
import torch
from torch import Generator, Tensor

from dirl_cli.data.order import generator
from dirl_cli.diffusion.states import BlockMasks, LeftToRight, Trace, Views
from dirl_cli.dpo.batches import PairRows
from dirl_cli.dpo.pairs import Pair
from dirl_cli.dpo.preference import LINKS, Preference
from dirl_cli.models.load import DiffusionLM
from dirl_cli.training.logprobs import LogprobModel
from tests.helpers.answers import ANSWERS, EIGHT, TOKENS, answer, assert_same, gradient, widened
from tests.helpers.small import PAD, small_lm
from tests.reference.objectives import as_sampled, left_to_right, some_of_every_block
from tests.reference.preferences import LOSS_WITHOUT_PREFERENCE, preference_loss

PAIRS = [Pair(*group[:2]) for group in ANSWERS] + [Pair(answer(EIGHT, 12, seed=9, stop_at=2), ANSWERS[2][0])]
LIKELIHOODS = {
    "trace": (Trace(), as_sampled),
    "elbo": (BlockMasks(draws=2), some_of_every_block),
    "left_to_right": (LeftToRight(), left_to_right),
}
PLAIN = {"label_smoothing": 0.0, "length_normalised": False, "sft_weight": 0.0}


def packed(
    lm: DiffusionLM,
    reference: DiffusionLM,
    preference: Preference,
    views: Views,
    train_tail: bool = True,
    row_tokens: int = 96,
    rows_each: int = 1,
    padding: int = 0,
) -> tuple[float, Tensor, dict[str, float]]:
    """The mean loss of all pairs, its gradient (flat) and the other sums over the pairs, divided by their number."""
    rows = PairRows(views, TOKENS, PAD, row_tokens, train_tail)(PAIRS, 7)
    lm.model.zero_grad()
    sums: dict[str, float] = {}
    for part in rows.split(rows_each):
        part = widened(part, padding)
        with torch.no_grad():
            ref_logprobs = LogprobModel(reference.model, reference.unsampled_ids)(part)[0]
        logprobs, entropy, _ = LogprobModel(lm.model, lm.unsampled_ids)(part)
        for name, value in preference.loss(part.with_extras(ref_logprobs=ref_logprobs), logprobs, entropy).items():
            sums[name] = sums.get(name, 0.0) + value.item() / len(PAIRS)
            if name == "loss":
                (value / len(PAIRS)).backward()
    return sums.pop("loss"), gradient(lm), sums


def by_formula(
    lm: DiffusionLM, reference: DiffusionLM, likelihood: str, link: str, beta: float, train_tail: bool, **options
) -> tuple[float, Tensor]:
    pairs = [pair.answers for pair in PAIRS]
    states = LIKELIHOODS[likelihood][1]
    loss = preference_loss(lm, reference, pairs, states, link, beta, generator(7), train_tail=train_tail, **options)
    lm.model.zero_grad()
    loss.backward()
    return loss.item(), gradient(lm)


@pytest.mark.parametrize(
    ("link", "beta", "options", "train_tail"),
    [
        ("sigmoid", 0.1, {}, True),
        ("sigmoid", 0.3, {"label_smoothing": 0.2, "sft_weight": 0.5}, False),
        ("hinge", 0.05, {"label_smoothing": 0.1}, True),
        ("ipo", 0.3, {"length_normalised": True, "sft_weight": 0.1}, False),
    ],
)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_pairs_equal_their_formula_in_loss_and_gradient(likelihood, link, beta, options, train_tail):
    lm, reference = small_lm(scale=3.0), small_lm(seed=1, scale=3.0)
    preference = Preference(link, beta, **PLAIN | options)
    loss, grad, _ = packed(lm, reference, preference, LIKELIHOODS[likelihood][0], train_tail)
    assert_same((loss, grad), by_formula(lm, reference, likelihood, link, beta, train_tail, **options))


@pytest.mark.parametrize(("row_tokens", "rows_each", "padding"), [(1, 1, 0), (1, 3, 5), (400, 9, 0)])
def test_how_pairs_are_packed_changes_nothing(row_tokens, rows_each, padding):
    lm, reference = small_lm(scale=3.0), small_lm(seed=1, scale=3.0)
    preference = Preference("sigmoid", 0.1, **PLAIN)
    one = packed(lm, reference, preference, BlockMasks(draws=2))
    other = packed(
        lm, reference, preference, BlockMasks(draws=2), row_tokens=row_tokens, rows_each=rows_each, padding=padding
    )
    assert_same(other[:2], one[:2])
    assert other[2] == pytest.approx(one[2], rel=1e-4, abs=1e-5)


def test_both_answers_of_a_pair_are_in_one_row_and_share_its_prompt():
    rows = PairRows(Trace(), TOKENS, PAD, 1, True)([Pair(answer(EIGHT, 4, seed=1), answer(EIGHT, 4, seed=2))], 0)
    assert rows.token_ids.shape[0] == 1
    assert rows.extras["sample"].unique().tolist() == [0, 1]
    assert (rows.view == 0).sum() == 8  # the prompt, once


@pytest.mark.parametrize("link", LOSS_WITHOUT_PREFERENCE)
def test_a_policy_that_is_the_reference_prefers_nothing(link):
    lm = small_lm()
    loss, _, watched = packed(lm, lm, Preference(link, 0.1, **PLAIN), Trace())
    assert loss == pytest.approx(LOSS_WITHOUT_PREFERENCE[link], abs=1e-5)
    assert watched["reward_margin"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("link", "margin", "loss"),
    [("sigmoid", 2.0, log(1 + exp(-2))), ("hinge", 0.25, 0.75), ("hinge", 1.5, 0.0), ("ipo", 1.0, 25.0)],
)
def test_links_by_hand(link, margin, loss):
    assert LINKS[link](torch.tensor(margin), 0.1).item() == pytest.approx(loss)


def test_masks_that_policy_and_reference_share_leave_less_chance_in_a_margin_than_masks_of_their_own():
    """VRPO's antithetic sampling: what the same masks do to both falls out of the difference."""
    lm, reference = small_lm(scale=3.0), small_lm(scale=3.0)
    with torch.no_grad():  # a policy that has moved a little from its reference
        for number, parameter in enumerate(lm.model.parameters()):
            parameter += (
                0.02 * parameter.std() * torch.randn(parameter.shape, generator=Generator().manual_seed(number))
            )

    def log_ratio(seed: int, ref_seed: int) -> float:
        layout = PairRows(BlockMasks(draws=1), TOKENS, PAD, 400, True)
        with torch.no_grad():
            totals = []
            for model, drawn in ((lm, seed), (reference, ref_seed)):
                rows = layout(PAIRS[:1], drawn)
                logprobs = LogprobModel(model.model, model.unsampled_ids)(rows)[0]
                totals.append((rows.weight * logprobs)[rows.extras["sample"] == 0].sum().item())
        return totals[0] - totals[1]

    shared = torch.tensor([log_ratio(seed, seed) for seed in range(30)])
    apart = torch.tensor([log_ratio(seed, seed + 100) for seed in range(30)])
    assert shared.std() < 0.3 * apart.std()
