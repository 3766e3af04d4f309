"""A decoder's forward into the KV cache: functions of joined weights, and transformers' own beside it.

Where a model's kind is known its layers take one product for queries, keys and values, one for gate and up, and one
function for all that is between two products. Any other is computed by transformers.

Shapes: T tokens of any sequences, D hidden size, H query heads, K key heads, E head size, I inner size of an MLP.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from dirl_cli.models.experts import choose_experts
from dirl_cli.models.joined_weights import can_join, join
from dirl_cli.models.kv_cache import PAGES, Attend, KVCache
from dirl_cli.models.low_precision import inference_model
from dirl_cli.rollout.layer_functions import PLAIN, Functions, Heads, Norm
from dirl_cli.rollout.products import Product, Products, product

# Decoders of layers x + attention(norm(x)), then x + MLP(norm(x)), with RMSNorm and rotary embedding.
KINDS = frozenset(
    (
        "LlamaModel",
        "MistralModel",
        "MixtralModel",
        "Qwen2Model",
        "Qwen2MoeModel",
        "Qwen3Model",
        "Qwen3MoeModel",
        "SmolLM3Model",
    )
)
STATIC_ROTATIONS = frozenset(("default", "linear", "llama3", "yarn"))  # an angle depends on nothing but its position


class Decoder(Protocol):
    """A model's forward up to the final hidden states, and its head. It follows the weights of `model`.

    head: final hidden states (N, D) to logits (N, V).
    """

    model: PreTrainedModel
    head: Product

    def __call__(self, cache: KVCache, token_ids: Tensor, position: Tensor, index: Tensor, attend: Attend) -> Tensor:
        """Final hidden states (T, D) of T tokens, whose keys and values go into `cache`.

        token_ids, position: (T,). index: (T,) where each is cached, page * page_size + offset.
        """
        ...

    def renew(self) -> None:
        """Follow weights that were changed in place."""
        ...


def decoder_of(model: PreTrainedModel, products: Products = "auto") -> Decoder:
    """The forward of a model in evaluation mode, whatever mode and attention it is in."""
    if not is_known(model):
        return ModelDecoder(model, products)
    if model.device.type != "cuda":
        return JoinedDecoder(model, products)
    from dirl_cli.rollout.decoder_triton import FUSED  # which only a GPU has the package for

    return JoinedDecoder(model, products, FUSED)


def head_of(model: PreTrainedModel, products: Products) -> Product:
    """The product with a model's output embeddings."""
    return product_of(cast(nn.Linear, model.get_output_embeddings()), products)


class ModelDecoder:
    """As transformers computes it: for any kind of model, and what `JoinedDecoder` has to equal."""

    def __init__(self, model: PreTrainedModel, products: Products = "auto") -> None:
        self.model = model
        self.head = head_of(model, products)
        second = inference_model(model, PAGES)
        choose_experts(second)
        self._decoder = second.get_decoder()

    def __call__(self, cache: KVCache, token_ids: Tensor, position: Tensor, index: Tensor, attend: Attend) -> Tensor:
        """See `Decoder.__call__`."""
        output = self._decoder(
            input_ids=token_ids[None],
            position_ids=position[None],
            past_key_values=cache.at(index),
            use_cache=False,
            attend=attend,
        )
        return output.last_hidden_state[0]

    def renew(self) -> None:
        """See `Decoder.renew`."""
        self.head.renew()


class GatedMlp:
    """down(silu(gate) × up). gate_up: one product for both. dtype: of its weights."""

    def __init__(self, gate_up: Product, down: Product, gated: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        self.products = [gate_up, down]
        self.gated = gated
        self.dtype: torch.dtype | None = dtype

    def __call__(self, x: Tensor) -> Tensor:
        gate_up, down = self.products
        return down(self.gated(gate_up(x)))


class ModuleMlp:
    """A module that maps (1, T, D) to the same, such as a mixture of experts, as it is."""

    dtype: torch.dtype | None = None  # it casts what it takes itself

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.products: list[Product] = []

    def __call__(self, x: Tensor) -> Tensor:
        changed: Tensor = self.module(x[None])[0]
        return changed


@dataclass(frozen=True)
class Layer:
    """A layer's weights. qkv: one product for queries, keys and values, in this order. dtype: of its weights."""

    attention_norm: Norm
    qkv: Product
    heads: Heads
    scale: float
    dtype: torch.dtype
    out: Product
    mlp_norm: Norm
    mlp: GatedMlp | ModuleMlp


class JoinedDecoder:
    """Functions of a model's weights, which it joins in place (see `join`), for models that `is_known` admits.

    functions: what computes all that is between two products.
    """

    def __init__(self, model: PreTrainedModel, products: Products = "auto", functions: Functions = PLAIN) -> None:
        self.model = model
        self.head = head_of(model, products)
        self._functions = functions
        # In evaluation mode: experts are called as the modules that they are, and may be captured in a graph.
        second = inference_model(model)
        choose_experts(second)
        decoder: Any = second.get_decoder()
        self._embedding = decoder.embed_tokens.weight.detach()
        self._rotary = decoder.rotary_emb
        self._norm = norm_of(decoder.norm)
        modules = decoder.layers[: model.config.num_hidden_layers]
        self._layers = [layer_of(module, products, functions) for module in modules]

    def __call__(self, cache: KVCache, token_ids: Tensor, position: Tensor, index: Tensor, attend: Attend) -> Tensor:
        """See `Decoder.__call__`."""
        if cache.rotations is None:
            cache.rotations = self._rotations(cache.length)
        rotation = cache.rotations.index_select(0, position)  # (T, 2, E)

        x = nn.functional.embedding(token_ids, self._embedding)  # (T, D)
        change = None  # that the last product makes to x
        add_and_norm = self._functions.add_and_norm
        for number, layer in enumerate(self._layers):
            keys, values = cache.of_layer(number, layer.heads.keys, layer.heads.size, layer.dtype, x.device)
            normed = add_and_norm(x, change, layer.attention_norm, layer.dtype)
            qkv = layer.qkv(normed).view(len(x), -1, layer.heads.size)  # (T, H + 2 K, E)
            query = self._functions.rotate_and_cache(qkv, layer.heads, rotation, keys, values, index)
            del qkv  # which may be large
            change = layer.out(attend(query, keys, values, layer.scale).flatten(1))
            del query
            normed = add_and_norm(x, change, layer.mlp_norm, layer.mlp.dtype)
            change = layer.mlp(normed)
        return add_and_norm(x, change, self._norm, None)

    def renew(self) -> None:
        """See `Decoder.renew`."""
        self.head.renew()
        for layer in self._layers:
            for each in (layer.qkv, layer.out, *layer.mlp.products):
                each.renew()

    def _rotations(self, length: int) -> Tensor:
        """Cosines and sines of the angles that each position turns pairs of values by: (length, 2, E)."""
        position = torch.arange(length, device=self._embedding.device)
        cos, sin = self._rotary(self._embedding, position[None])  # (1, length, E) each, in the model's dtype
        return torch.stack([cos[0], sin[0]], 1).float()


def is_known(model: PreTrainedModel) -> bool:
    """Whether a model is of the KINDS and its layers are as they were published, and not wrapped or packed."""
    decoder: Any = model.get_decoder()
    if type(decoder).__name__ not in KINDS or decoder.rotary_emb.rope_type not in STATIC_ROTATIONS:
        return False
    return all(can_join(queries_keys_values(layer)) for layer in decoder.layers)


def queries_keys_values(layer: Any) -> list[nn.Linear]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def layer_of(module: Any, products: Products, functions: Functions) -> Layer:
    """A layer of a known decoder, its weights joined."""
    attention = module.self_attn
    size = attention.head_dim
    heads = Heads(
        queries=attention.q_proj.out_features // size,
        keys=attention.k_proj.out_features // size,
        size=size,
        query_norm=norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None,
        rotates=bool(getattr(attention, "use_rope", True)),
    )
    return Layer(
        attention_norm=norm_of(module.input_layernorm),
        qkv=product(*join(queries_keys_values(module)), products),
        heads=heads,
        scale=attention.scaling,
        dtype=attention.v_proj.weight.dtype,
        out=product_of(attention.o_proj, products),
        mlp_norm=norm_of(module.post_attention_layernorm),
        mlp=mlp_of(module.mlp, products, functions),
    )


def mlp_of(module: Any, products: Products, functions: Functions) -> GatedMlp | ModuleMlp:
    """An MLP with its weights joined, or the module where it is anything else."""
    names = dict(module.named_children())
    if not {"gate_proj", "up_proj", "down_proj"} <= names.keys() or not isinstance(module.act_fn, SiLUActivation):
        return ModuleMlp(module)
    gate_up = [module.gate_proj, module.up_proj]
    if not can_join(gate_up):
        return ModuleMlp(module)
    both = product(*join(gate_up), products)
    return GatedMlp(both, product_of(module.down_proj, products), functions.gated, module.gate_proj.weight.dtype)


def product_of(layer: nn.Linear, products: Products) -> Product:
    """The product of a linear layer."""
    return product(layer.weight.detach(), layer.bias, products)


def norm_of(module: Any) -> Norm:
    """The RMSNorm of a module."""
    weight = module.weight.detach()
    eps = module.variance_epsilon
    return Norm(weight, eps, torch.tensor(math.sqrt(eps), dtype=torch.float32, device=weight.device))
