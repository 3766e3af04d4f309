"""Experts computed side by side: what transformers' loop over them gives, without asking the device for a number."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dirl_cli.models.experts import ALIGNMENT, GROUPED, choose_experts, each_expert_of_all, group_by_expert
from dirl_cli.models.low_precision import cast_linear_weights, recast
from dirl_cli.rollout import decoder, native
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding
from tests.helpers.small import random_lm

PROMPTS = [[5, 6, 7], [8] * 9]
DECODING = Decoding(max_new_tokens=12)
ASKING = {"aten::nonzero", "aten::_local_scalar_dense", "aten::unique", "aten::bincount"}  # the device, for a number


def mixture(implementation: str) -> PreTrainedModel:
    model = random_lm("moe").model
    model.config._experts_implementation = implementation
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def outcome(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of all parameters."""
    logits = model(tokens, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


ALL_EXPERTS_FUNCTIONS.register("each_of_all", each_expert_of_all)


@pytest.mark.parametrize("implementation", [GROUPED, "each_of_all"])
@pytest.mark.parametrize("tokens", [1, 3, 40])  # of a single token most experts get nothing
def test_every_implementation_gives_what_a_loop_over_the_experts_gives(implementation, tokens):
    ids = torch.arange(2, 2 + tokens)[None] % 48
    expected, expected_gradients = outcome(mixture("eager"), ids)
    logits, gradients = outcome(mixture(implementation), ids)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert any("experts" in name for name in gradients)
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm()
        # Of a token alone a query has none but what rounding leaves.
        assert error <= 1e-4 * expected_gradients[name].norm() + 3e-6 * largest, name


def test_products_are_in_the_dtype_of_autocast():
    ids = torch.arange(2, 30)[None]
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_gradients = outcome(mixture("eager"), ids)
        logits, gradients = outcome(mixture(GROUPED), ids)
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    in_full, _ = outcome(mixture(GROUPED), ids)
    assert not torch.equal(logits.float(), in_full)
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error < 0.05, name


def test_each_expert_has_its_pairs_side_by_side():
    ids = torch.tensor([2, 0, 2, 2, 0])
    place, ends, rows = group_by_expert(ids, 4, aligned=False)
    assert place.tolist() == [2, 0, 3, 4, 1]
    assert ends.tolist() == [2, 2, 5, 5] and rows == 5


def test_where_there_are_gradients_each_expert_has_a_multiple_of_the_alignment():
    ids = torch.tensor([2] * 9 + [0])
    place, ends, rows = group_by_expert(ids, 4, aligned=True)
    assert ends.tolist() == [8, 16, 32, 48] and rows == 48
    assert place.tolist() == [*range(16, 25), 0]
    assert rows % ALIGNMENT == 0 and len(set(place.tolist())) == len(ids)


class Refusing(TorchDispatchMode):
    """Stands for the capture of a CUDA graph, in which nothing may be asked of the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name() not in ASKING, f"{function.name()} is not permitted"
        return function(*args, **(kwargs or {}))


def sampled_while_refusing(monkeypatch, implementation: str):
    """Answers of the sampler whose forwards are those of a GPU, with what a graph would hold computed under watch."""
    lm = random_lm("moe")

    def choose(model: PreTrainedModel) -> None:
        model.config._experts_implementation = implementation

    def replay(key, work) -> None:
        if isinstance(key, int):  # a forward; what is drawn from its logits is another kernel on a GPU
            with Refusing():
                work()
        else:
            work()

    monkeypatch.setattr(decoder, "choose_experts", choose)
    monkeypatch.setattr(native, "run_eagerly", replay)
    sampler = NativeSampler(lm, by_blocks=True)
    return sampler.sample(PROMPTS, 1, DECODING)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_forward_of_the_sampler_can_be_captured(monkeypatch, is_known):
    if not is_known:
        monkeypatch.setattr(decoder, "is_known", lambda model: False)
    eager = NativeSampler(random_lm("moe"), by_blocks=False).sample(PROMPTS, 1, DECODING)
    for implementation in (GROUPED, "each_of_all"):
        found = sampled_while_refusing(monkeypatch, implementation)
        assert [one.token_ids for [one] in found] == [one.token_ids for [one] in eager]
    with pytest.raises(AssertionError, match="nonzero is not permitted"):
        sampled_while_refusing(monkeypatch, "eager")


def test_a_cpu_goes_through_the_experts_one_after_another():
    model = random_lm("moe").model
    choose_experts(model)
    assert model.config._experts_implementation == "eager"


def test_experts_are_cast_with_the_linear_layers_and_follow_them():
    model = mixture("eager")
    narrow = cast_linear_weights(model, torch.bfloat16)
    experts = {name: weight for name, weight in narrow.named_parameters() if ".experts." in name}
    assert len(experts) == 4 and {weight.dtype for weight in experts.values()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    recast(narrow, model)
    for name, weight in experts.items():
        assert torch.equal(weight, model.get_parameter(name).to(torch.bfloat16)), name
