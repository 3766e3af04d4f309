"""What stands between a layer's products, as plain functions; decoder_triton.py has the same for a GPU.

Shapes: T tokens, D hidden size, H query heads, K key heads, E head size, I inner size of an MLP.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x ÷ √(mean x² + eps) × weight. root_eps: √eps, a tensor beside the weight."""

    weight: Tensor
    eps: float
    root_eps: Tensor


@dataclass(frozen=True)
class Heads:
    """A layer's heads: H `queries`, K `keys` and as many values, of E values each, the `size`.

    query_norm, key_norm: of each head, where the model has them. rotates: whether positions turn queries and keys.
    """

    queries: int
    keys: int
    size: int
    query_norm: Norm | None
    key_norm: Norm | None
    rotates: bool


@dataclass(frozen=True)
class Functions:
    """The functions of a layer: those of this module, or what computes the same."""

    add_and_norm: Callable[[Tensor, Tensor | None, Norm, torch.dtype | None], Tensor]
    rotate_and_cache: Callable[[Tensor, Heads, Tensor, Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor], Tensor]


def add_and_norm(x: Tensor, change: Tensor | None, norm: Norm, dtype: torch.dtype | None) -> Tensor:
    """Add the change to x, in place, and norm the sum in float32: (T, D) each. dtype: of what is returned, if given."""
    if change is not None:
        x.add_(change)
    normed = normalised(x.float(), norm).to(x.dtype) * norm.weight
    return normed.to(dtype or normed.dtype)


def rotate_and_cache(
    qkv: Tensor, heads: Heads, rotation: Tensor, keys: Tensor, values: Tensor, index: Tensor
) -> Tensor:
    """Norm and rotate queries and keys, and write keys and values into the cache; returns the queries (T, H, E).

    qkv: (T, H + 2 K, E). rotation: cosines and sines, (T, 2, E), whose halves of E are alike.
    keys, values: a layer's, (pages, page_size, K, E). index: (T,), page * page_size + offset.
    """
    turned = qkv.narrow(1, 0, heads.queries + heads.keys).float()
    if heads.query_norm and heads.key_norm:
        turned = normalised(turned, heads.query_norm)
        turned.narrow(1, 0, heads.queries).mul_(heads.query_norm.weight)
        turned.narrow(1, heads.queries, heads.keys).mul_(heads.key_norm.weight)
    if heads.rotates:
        turned = rotated(turned, rotation)
    turned = turned.to(keys.dtype)
    keys.flatten(0, 1).index_copy_(0, index, turned.narrow(1, heads.queries, heads.keys))
    values.flatten(0, 1).index_copy_(0, index, qkv.narrow(1, heads.queries + heads.keys, heads.keys))
    return turned.narrow(1, 0, heads.queries)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) × up. gate_up: (T, 2 I), side by side. Returns (T, I)."""
    gate, up = gate_up.chunk(2, -1)
    return nn.functional.silu(gate).mul_(up)


PLAIN = Functions(add_and_norm, rotate_and_cache, gated)


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """x ÷ √(mean x² + eps), over the last dimension. The norms of queries and keys have one eps."""
    root_mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).div_(math.sqrt(x.shape[-1]))
    return x / torch.hypot(root_mean, norm.root_eps)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn values i and i + E / 2 of each head by the angle of the token's position. x: (T, heads, E)."""
    cos, sin = rotation[:, :, None].unbind(1)  # (T, 1, E) each
    half = x.shape[-1] // 2
    first, second = x.split(half, -1)
    sin = sin.narrow(-1, 0, half)
    turned = x * cos
    turned.narrow(-1, 0, half).addcmul_(second, sin, value=-1)
    turned.narrow(-1, half, half).addcmul_(first, sin)
    return turned
