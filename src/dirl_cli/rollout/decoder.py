"""A decoder's forward into the KV cache: plain functions of joined weights, and transformers' own beside it.

Where a model's kind is known its layers take one product for queries, keys and values, one for gate and up, and one
function for all that is between two products. Any other is computed by transformers.

Shapes: T tokens of any slots, D hidden size, H query heads, K key heads, E head size, I inner size of an MLP.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from dirl_cli.models.joined_weights import can_join, join
from dirl_cli.models.kv_cache import SLOTS, Attend, KVCache
from dirl_cli.models.low_precision import inference_model
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

        token_ids, position: (T,). index: (T,) where each is cached, slot * length + position.
        """
        ...

    def renew(self) -> None:
        """Follow weights that were changed in place."""
        ...


def decoder_of(model: PreTrainedModel, products: Products = "auto") -> Decoder:
    """The forward of a model in evaluation mode, whatever mode and attention it is in."""
    if is_known(model):
        return JoinedDecoder(model, products)
    return ModelDecoder(model, products)


def head_of(model: PreTrainedModel, products: Products) -> Product:
    """The product with a model's output embeddings."""
    return product_of(cast(nn.Linear, model.get_output_embeddings()), products)


class ModelDecoder:
    """As transformers computes it: for any kind of model, and what `JoinedDecoder` has to equal."""

    def __init__(self, model: PreTrainedModel, products: Products = "auto") -> None:
        self.model = model
        self.head = head_of(model, products)
        self._decoder = inference_model(model, SLOTS).get_decoder()

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


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x ÷ √(mean x² + eps) × weight. root_eps: √eps, a tensor beside the weight."""

    weight: Tensor
    eps: float
    root_eps: Tensor


class GatedMlp:
    """down(silu(gate) × up). gate_up: one product for both."""

    def __init__(self, gate_up: Product, down: Product) -> None:
        self.products = [gate_up, down]

    def __call__(self, x: Tensor) -> Tensor:
        gate_up, down = self.products
        return down(gated(gate_up(x)))


class ModuleMlp:
    """A module that maps (1, T, D) to the same, such as a mixture of experts, as it is."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.products: list[Product] = []

    def __call__(self, x: Tensor) -> Tensor:
        changed: Tensor = self.module(x[None])[0]
        return changed


@dataclass(frozen=True)
class Layer:
    """A layer's weights. qkv: one product for queries, keys and values, in this order.

    query_norm, key_norm: of each head, where the model has them. size: E. dtype: of keys and values. rotates: whether
    positions turn queries and keys.
    """

    attention_norm: Norm
    qkv: Product
    query_norm: Norm | None
    key_norm: Norm | None
    out: Product
    mlp_norm: Norm
    mlp: GatedMlp | ModuleMlp
    heads: int
    key_heads: int
    size: int
    dtype: torch.dtype
    scale: float
    rotates: bool


class JoinedDecoder:
    """Plain functions of a model's weights, which it joins in place: see `join`. For models that `is_known` admits."""

    def __init__(self, model: PreTrainedModel, products: Products = "auto") -> None:
        self.model = model
        self.head = head_of(model, products)
        # In evaluation mode: experts are called as the modules that they are.
        decoder: Any = inference_model(model).get_decoder()
        self._embedding = decoder.embed_tokens.weight.detach()
        self._rotary = decoder.rotary_emb
        self._norm = norm_of(decoder.norm)
        modules = decoder.layers[: model.config.num_hidden_layers]
        self._layers = [layer_of(module, products) for module in modules]

    def __call__(self, cache: KVCache, token_ids: Tensor, position: Tensor, index: Tensor, attend: Attend) -> Tensor:
        """See `Decoder.__call__`."""
        if cache.rotations is None:
            cache.rotations = self._rotations(cache.length)
        rotation = cache.rotations.index_select(0, position)  # (T, 2, E)

        x = nn.functional.embedding(token_ids, self._embedding)  # (T, D)
        change = None  # that the last product makes to x
        for number, layer in enumerate(self._layers):
            keys, values = cache.of_layer(number, layer.key_heads, layer.size, layer.dtype, x.device)
            normed = add_and_norm(x, change, layer.attention_norm)
            change = self._attention(layer, normed, rotation, keys, values, index, attend)
            normed = add_and_norm(x, change, layer.mlp_norm)
            change = layer.mlp(normed)
        return add_and_norm(x, change, self._norm)

    def _attention(
        self,
        layer: Layer,
        normed: Tensor,
        rotation: Tensor,
        keys: Tensor,
        values: Tensor,
        index: Tensor,
        attend: Attend,
    ) -> Tensor:
        """What a layer's attention adds to its input: (T, D)."""
        qkv = layer.qkv(normed).view(len(normed), -1, layer.size)  # (T, H + 2 K, E)
        query = rotate_and_cache(qkv, layer, rotation, keys, values, index)
        del qkv  # which may be large
        return layer.out(attend(query, keys, values, layer.scale).flatten(1))

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


def add_and_norm(x: Tensor, change: Tensor | None, norm: Norm) -> Tensor:
    """Add the change to x, in place, and norm the sum: (T, D) each."""
    if change is not None:
        x.add_(change)
    return rms_norm(x, norm)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """See `Norm`; over the last dimension, in float32 but for the weight."""
    return normalised(x.float(), norm).to(x.dtype) * norm.weight


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """x ÷ √(mean x² + eps), over the last dimension."""
    root_mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).div_(math.sqrt(x.shape[-1]))
    return x / torch.hypot(root_mean, norm.root_eps)


def rotate_and_cache(
    qkv: Tensor, layer: Layer, rotation: Tensor, keys: Tensor, values: Tensor, index: Tensor
) -> Tensor:
    """Norm and rotate queries and keys, and write keys and values into the cache; returns the queries (T, H, E).

    qkv: (T, H + 2 K, E). rotation: (T, 2, E). keys, values: a layer's, (slots, length, K, E). index: (T,).
    """
    heads, key_heads = layer.heads, layer.key_heads
    turned = qkv.narrow(1, 0, heads + key_heads).float()
    if layer.query_norm and layer.key_norm:
        turned = normalised(turned, layer.query_norm)
        turned.narrow(1, 0, heads).mul_(layer.query_norm.weight)
        turned.narrow(1, heads, key_heads).mul_(layer.key_norm.weight)
    if layer.rotates:
        turned = rotated(turned, rotation)
    turned = turned.to(keys.dtype)
    keys.flatten(0, 1).index_copy_(0, index, turned.narrow(1, heads, key_heads))
    values.flatten(0, 1).index_copy_(0, index, qkv.narrow(1, heads + key_heads, key_heads))
    return turned.narrow(1, 0, heads)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn values i and i + E / 2 of each head by the angle of the token's position. x: (T, heads, E)."""
    cos, sin = rotation[:, :, None].unbind(1)  # (T, 1, E) each, their halves alike
    half = x.shape[-1] // 2
    first, second = x.split(half, -1)
    sin = sin.narrow(-1, 0, half)
    turned = x * cos
    turned.narrow(-1, 0, half).addcmul_(second, sin, value=-1)
    turned.narrow(-1, half, half).addcmul_(first, sin)
    return turned


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) × up. gate_up: (T, 2 I), side by side. Returns (T, I)."""
    gate, up = gate_up.chunk(2, -1)
    return nn.functional.silu(gate).mul_(up)


def is_known(model: PreTrainedModel) -> bool:
    """Whether a model is of the KINDS and its layers are as they were published, and not wrapped or packed."""
    decoder: Any = model.get_decoder()
    if type(decoder).__name__ not in KINDS or decoder.rotary_emb.rope_type not in STATIC_ROTATIONS:
        return False
    return all(can_join(queries_keys_values(layer)) for layer in decoder.layers)


def queries_keys_values(layer: Any) -> list[nn.Linear]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def layer_of(module: Any, products: Products) -> Layer:
    """A layer of a known decoder, its weights joined."""
    attention = module.self_attn
    size = attention.head_dim
    return Layer(
        attention_norm=norm_of(module.input_layernorm),
        qkv=product(*join(queries_keys_values(module)), products),
        query_norm=norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None,
        out=product_of(attention.o_proj, products),
        mlp_norm=norm_of(module.post_attention_layernorm),
        mlp=mlp_of(module.mlp, products),
        heads=attention.q_proj.out_features // size,
        key_heads=attention.k_proj.out_features // size,
        size=size,
        dtype=attention.v_proj.weight.dtype,
        scale=attention.scaling,
        rotates=bool(getattr(attention, "use_rope", True)),
    )


def mlp_of(module: Any, products: Products) -> GatedMlp | ModuleMlp:
    """An MLP with its weights joined, or the module where it is anything else."""
    names = dict(module.named_children())
    if not {"gate_proj", "up_proj", "down_proj"} <= names.keys() or not isinstance(module.act_fn, SiLUActivation):
        return ModuleMlp(module)
    gate_up = [module.gate_proj, module.up_proj]
    if not can_join(gate_up):
        return ModuleMlp(module)
    return GatedMlp(product(*join(gate_up), products), product_of(module.down_proj, products))


def product_of(layer: nn.Linear, products: Products) -> Product:
    """The product of a linear layer."""
    return product(layer.weight.detach(), layer.bias, products)


def norm_of(module: Any) -> Norm:
    """The RMSNorm of a module."""
    weight = module.weight.detach()
    eps = module.variance_epsilon
    return Norm(weight, eps, torch.tensor(math.sqrt(eps), dtype=torch.float32, device=weight.device))
