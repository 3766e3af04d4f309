"""Products with reordered weights: those of torch but for rounding, and the same kind at every start."""

import pytest
import torch
from torch import nn

from dirl_cli.rollout.products import WORTH_REORDERING, PlainProduct, ReorderedProduct, is_reordered, product

can_reorder = pytest.mark.skipif(
    not is_reordered(1, torch.float32, "reordered"), reason="oneDNN is not here, or no x86"
)


def weight_and_input(out: int = 24, size: int = 40, tokens: int = 5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(out, size, generator=generator), torch.randn(tokens, size, generator=generator)


@can_reorder
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("bias", [None, torch.arange(24.0)])
def test_a_reordered_product_is_the_plain_one_but_for_rounding(tokens, bias):
    weight, x = weight_and_input(tokens=tokens)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias)
    for kind in (ReorderedProduct, PlainProduct):
        torch.testing.assert_close(kind(weight, bias)(x).double(), expected, atol=2e-5, rtol=2e-6)


@can_reorder
def test_a_reordered_product_takes_what_is_no_longer_contiguous():
    weight, x = weight_and_input()
    wide = torch.cat([x, x], 1)[:, 20:60]
    torch.testing.assert_close(ReorderedProduct(weight, None)(wide), nn.functional.linear(wide, weight))


@can_reorder
def test_it_is_the_same_to_the_bit_every_time():
    weight, x = weight_and_input(512, 512, 7)
    assert torch.equal(ReorderedProduct(weight, None)(x), ReorderedProduct(weight.clone(), None)(x.clone()))


@can_reorder
def test_it_follows_its_weight_when_it_is_renewed():
    weight, x = weight_and_input()
    product_of_it = ReorderedProduct(weight, None)
    weight.mul_(2)
    before = product_of_it(x)
    product_of_it.renew()
    torch.testing.assert_close(product_of_it(x), 2 * before)


@can_reorder
def test_which_kind_it_is_depends_on_the_size_alone_and_can_be_said():
    small, _ = weight_and_input()
    large = torch.zeros(512, WORTH_REORDERING // 512)
    kinds = {
        (name, choice): type(product(weight, None, choice))
        for name, weight in {"small": small, "large": large}.items()
        for choice in ("auto", "plain", "reordered")
    }
    assert kinds == {
        ("small", "auto"): PlainProduct,
        ("small", "plain"): PlainProduct,
        ("small", "reordered"): ReorderedProduct,
        ("large", "auto"): ReorderedProduct,
        ("large", "plain"): PlainProduct,
        ("large", "reordered"): ReorderedProduct,
    }


def test_on_another_machine_nothing_is_reordered(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert isinstance(product(torch.zeros(512, 512), None, "reordered"), PlainProduct)
    assert not is_reordered(2**30, torch.float32, "auto")
