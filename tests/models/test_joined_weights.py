"""Weights side by side in one tensor: what the layers compute, learn and save is as before."""

import copy

import torch
from safetensors.torch import load_file
from torch import nn

from dirl_cli.models.joined_weights import can_join, join
from dirl_cli.models.load import SavedModel
from dirl_cli.rollout.decoder import JoinedDecoder, decoder_of
from tests.helpers.small import small_lm


def layers(bias: bool) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(8, out, bias=bias) for out in (4, 2, 2)]


def test_one_product_computes_what_the_layers_do():
    for bias in (True, False):
        separate, x = layers(bias), torch.randn(5, 8)
        expected = torch.cat([layer(x) for layer in separate], 1)
        torch.testing.assert_close(nn.functional.linear(x, *join(separate)), expected)


def test_the_layers_own_parameters_are_parts_of_it_and_change_it_in_place():
    separate = layers(bias=True)
    parameters = [layer.weight for layer in separate]
    weight, bias = join(separate)
    optimizer = torch.optim.SGD([p for layer in separate for p in layer.parameters()], lr=1.0)
    sum(layer(torch.ones(1, 8)).sum() for layer in separate).backward()
    optimizer.step()
    assert [layer.weight for layer in separate] == parameters
    assert torch.equal(weight, torch.cat(parameters))
    assert torch.equal(bias, torch.cat([layer.bias for layer in separate]))
    assert not weight.requires_grad


def test_what_is_joined_already_is_found_and_not_copied():
    separate = layers(bias=False)
    first, _ = join(separate)
    again, _ = join(separate)
    assert again.data_ptr() == first.data_ptr()
    assert again.shape == first.shape == (8, 8)


def test_they_learn_though_they_were_joined_in_inference():
    separate = layers(bias=False)
    with torch.inference_mode():
        join(separate)
    separate[1](torch.ones(1, 8)).sum().backward()
    assert separate[1].weight.grad is not None


def test_only_plain_layers_of_one_kind_are_joined():
    one, other, _ = layers(bias=True)
    assert can_join([one, other])
    assert not can_join([one, nn.Linear(8, 2, bias=False)])
    assert not can_join([one, copy.deepcopy(other).bfloat16()])
    assert not can_join([one, nn.Sequential(other)])
    assert not can_join([one, nn.Linear(8, 3)])  # of which another would begin where products round otherwise


def test_what_is_learned_is_the_same_to_the_bit_whether_weights_are_joined_or_not():
    """Since a run that is continued may join them at another step."""
    learned = []
    for is_joined in (False, True):
        lm = small_lm()
        if is_joined:
            assert isinstance(decoder_of(lm.model), JoinedDecoder)
        optimizer = torch.optim.AdamW(lm.model.parameters(), lr=0.01)
        for _ in range(3):
            lm.model(torch.arange(3, 40)[None]).logits.logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        learned.append(lm.model.state_dict())
    for name, tensor in learned[0].items():
        assert torch.equal(tensor, learned[1][name])


def test_a_model_whose_weights_are_joined_is_saved_and_copied_as_any_other(tmp_path):
    lm = small_lm()
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    attention = lm.model.model.layers[0].self_attn
    join([attention.q_proj, attention.k_proj, attention.v_proj])
    lm.save(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    again = SavedModel("again", str(tmp_path / "model")).load("float32", "cpu").model.state_dict()
    copied = copy.deepcopy(lm.model).state_dict()
    for name, tensor in before.items():
        assert torch.equal(stored[name], tensor)
        assert torch.equal(again[name], tensor)
        assert torch.equal(copied[name], tensor)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in copied.values()}
    assert len(addresses) == len(copied)  # a copy has storages of its own
