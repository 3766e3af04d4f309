"""The decoder's forward by plain functions of joined weights: what transformers computes, in few kernels."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dirl_cli.models.kv_cache import KVCache
from dirl_cli.models.load import diffusion_lm
from dirl_cli.models.low_precision import cast_linear_weights
from dirl_cli.rollout.decoder import KINDS, JoinedDecoder, ModelDecoder, decoder_of
from dirl_cli.rollout.forward import EqualWidthSlots
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding
from tests.helpers.small import random_lm, small_lm

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-yarn": {"rope_parameters": YARN},
    "mistral": {"sliding_window": None, "head_dim": 12},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": EXPERTS | {"head_dim": 8, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "sdar": {"head_dim": 8, "tie_word_embeddings": True},
    "sdar_moe": EXPERTS | {"head_dim": 8},
}


def family(name: str) -> PreTrainedModel:
    """A random model whose norms and biases are no ones and zeros."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition("-")[0], **SIZES, **FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (3 if parameter.ndim > 1 else 0.3) * 0.05)
    return model


def two_forwards(decoder) -> tuple[list[Tensor], KVCache]:
    """Final hidden states of eight tokens in page 1, and of four more that see them and themselves."""
    cache = KVCache(pages=3, page_size=16, length=16)
    found = []
    for start, width in ((0, 8), (8, 4)):
        position = torch.arange(start, start + width)
        slot = EqualWidthSlots(1, slice(1, 2), width, start + width, None)
        token_ids = (position * 7 + 3) % 50
        found.append(decoder(cache, token_ids, position, position + 16, slot.attend))
    return found, cache


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("products", ["plain", "reordered"])
def test_it_computes_what_transformers_does_for_every_family(name, products):
    model = family(name)
    joined, theirs = decoder_of(model, products), ModelDecoder(model)
    assert isinstance(joined, JoinedDecoder)
    with torch.no_grad():
        found, cache = two_forwards(joined)
        expected, their_cache = two_forwards(theirs)
        for ours, other in zip(found, expected, strict=True):
            assert other.std() > 0.1
            torch.testing.assert_close(ours, other, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(joined.head(ours), theirs.head(other), atol=1e-4, rtol=1e-4)
    for layer in range(3):
        torch.testing.assert_close(cache.keys[layer], their_cache.keys[layer], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(cache.values[layer], their_cache.values[layer], atol=2e-5, rtol=1e-4)


def test_every_known_kind_is_among_these_families():
    assert {type(family(name).get_decoder()).__name__ for name in FAMILIES} == KINDS


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_answers_are_those_of_transformers_forward(name, by_blocks, shifted, monkeypatch):
    model = family(name)
    model.config.logit_shift = shifted
    lm = diffusion_lm(model, None, 4, 49)
    options = Decoding(strategy="low_confidence_dynamic", threshold=0.3, max_new_tokens=12, temperature=1.0)
    prompts = [[5, 6, 7], [9, 8, 7, 6], [11] * 9]
    ours = NativeSampler(lm, 4, by_blocks).sample(prompts, 2, options)
    monkeypatch.setattr("dirl_cli.rollout.native.decoder_of", ModelDecoder)
    theirs = NativeSampler(lm, 4, by_blocks).sample(prompts, 2, options)
    for group, other in zip(ours, theirs, strict=True):
        for one, their in zip(group, other, strict=True):
            assert (one.token_ids, one.reveal_step) == (their.token_ids, their.reveal_step)
            assert one.logprobs == pytest.approx(their.logprobs, abs=1e-4)


@pytest.mark.parametrize("kind", ["untied", "moe"])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_transformers(kind):
    model = random_lm(kind).model
    with torch.no_grad():
        [_, exact], _ = two_forwards(ModelDecoder(model))
        narrow = cast_linear_weights(model, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            [_, theirs], _ = two_forwards(ModelDecoder(model))
            [_, ours], cache = two_forwards(decoder_of(narrow))
    assert cache.keys[0].dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_other_kinds_are_left_to_transformers():
    config = AutoConfig.for_model("gpt_neox", **SIZES)
    assert isinstance(decoder_of(AutoModelForCausalLM.from_config(config).eval()), ModelDecoder)
    stretched = AutoConfig.for_model("llama", **SIZES, rope_parameters=YARN | {"rope_type": "dynamic"})
    assert isinstance(decoder_of(AutoModelForCausalLM.from_config(stretched).eval()), ModelDecoder)
    wrapped = family("qwen3")
    attention = wrapped.model.layers[1].self_attn
    attention.k_proj = torch.nn.Sequential(attention.k_proj)
    assert isinstance(decoder_of(wrapped), ModelDecoder)


# New weights


def test_a_push_from_the_trained_model_itself_copies_nothing_and_is_seen():
    trained = small_lm()
    optimizer = torch.optim.SGD(trained.model.parameters(), lr=0.5)
    options = Decoding(max_new_tokens=8)
    for products in ("plain", "reordered"):
        sampler = NativeSampler(trained, products=products)
        sampler.sample([[5, 6, 7]], 1, options)
        decoder = sampler.decoder
        trained.model(torch.tensor([[5, 6, 7, 8]])).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        with copies() as copied:
            sampler.update_weights(trained.model.named_parameters(), 1)
        assert not copied
        fresh = small_lm()
        fresh.model.load_state_dict(trained.model.state_dict())
        expected = NativeSampler(fresh, products=products).sample([[5, 6, 7]], 1, options)
        [[found]] = sampler.sample([[5, 6, 7]], 1, options)
        assert sampler.decoder is decoder
        assert (found.token_ids, found.logprobs) == (expected[0][0].token_ids, expected[0][0].logprobs)


def test_own_weights_that_are_joined_are_freed_and_allocated_again():
    lm, other = small_lm(), small_lm(seed=1)
    options = Decoding(max_new_tokens=8)
    expected = NativeSampler(other).sample([[5, 6, 7]], 1, options)
    sampler = NativeSampler(lm, own_weights=True)
    sampler.sample([[5, 6, 7]], 1, options)
    sampler.sleep()
    sampler.wake()
    sampler.update_weights(other.model.named_parameters(), version=0)
    assert sampler.sample([[5, 6, 7]], 1, options) == expected
    q, k = (lm.model.model.layers[0].self_attn.get_submodule(name).weight for name in ("q_proj", "k_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


# How many kernels

VIEWS = ("view", "slice", "split", "unbind", "chunk", "narrow", "unsqueeze", "transpose", "expand", "reshape", "alias")
VIEWS += ("t", "detach", "select", "as_strided", "unflatten", "permute", "squeeze", "_unsafe_view")


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name not in VIEWS:
            self.names[name] += 1
        return operation(*args, **(kwargs or {}))


@contextmanager
def copies() -> Iterator[Counter[str]]:
    """The copies between tensors that are made meanwhile."""
    found: Counter[str] = Counter()
    with Kernels() as kernels:
        yield found
    found.update({name: n for name, n in kernels.names.items() if "copy" in name})


def kernels_a_layer(name: str, of: type) -> Counter[str]:
    """Those of three layers less those of two, in a forward of a block on a CPU.

    Without a gradient and not in inference mode, where operations that are made of others would count once.
    """
    counts = []
    for layers in (2, 3):
        model = family(name)
        del model.model.layers[layers:]
        model.config.num_hidden_layers = layers
        decoder, cache = of(model, "plain"), KVCache(pages=2, page_size=16, length=16)
        position = torch.arange(4)
        slot = EqualWidthSlots(1, slice(1, 2), 4, 4, None)
        with torch.no_grad():
            decoder(cache, position, position, position + 16, slot.attend)  # what is made once
            with Kernels() as kernels:
                decoder(cache, position, position, position + 16, slot.attend)
        counts.append(kernels.names)
    return counts[1] - counts[0]


@pytest.mark.parametrize(("name", "most"), [("qwen3", 32), ("llama", 26), ("qwen2", 26)])
def test_a_layer_takes_few_kernels_of_which_four_are_products(name, most):
    kernels = kernels_a_layer(name, JoinedDecoder)
    assert kernels["mm"] + kernels["addmm"] == 4
    assert kernels["index_copy_"] == 2
    assert kernels.total() <= most, kernels
    assert kernels.total() < 0.7 * kernels_a_layer(name, ModelDecoder).total()
