"""What stands between a layer's products, in Triton: the functions of layer_functions.py, one kernel each.

Shapes: T tokens, D hidden size, H query heads, K key heads, E head size, I inner size of an MLP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dirl_cli.rollout.layer_functions import Functions, Heads, Norm

COLUMNS = 1024  # values that a program of `gated` computes


def add_and_norm(x: Tensor, change: Tensor | None, norm: Norm, dtype: torch.dtype | None) -> Tensor:
    """See `layer_functions.add_and_norm`. x: contiguous."""
    tokens, size = x.shape
    normed = torch.empty_like(x, dtype=dtype or torch.promote_types(x.dtype, norm.weight.dtype))
    _add_and_norm[tokens,](
        x,
        x if change is None else change.contiguous(),
        norm.weight,
        normed,
        norm.eps,
        size=size,
        width=triton.next_power_of_2(size),
        adds=change is not None,
        num_warps=8 if size > 2048 else 4,
    )
    return normed


def rotate_and_cache(
    qkv: Tensor, heads: Heads, rotation: Tensor, keys: Tensor, values: Tensor, index: Tensor
) -> Tensor:
    """See `layer_functions.rotate_and_cache`. qkv, rotation, keys, values: contiguous."""
    tokens, rows, size = qkv.shape
    query = keys.new_empty(tokens, heads.queries, size)
    query_norm, key_norm = heads.query_norm, heads.key_norm
    _rotate_and_cache[tokens, rows](
        qkv,
        rotation,
        query_norm.weight if query_norm else qkv,
        key_norm.weight if key_norm else qkv,
        query,
        keys,
        values,
        index,
        query_norm.eps if query_norm else 0.0,
        key_norm.eps if key_norm else 0.0,
        heads=heads.queries,
        key_heads=heads.keys,
        half=size // 2,
        width=triton.next_power_of_2(size // 2),
        norms=query_norm is not None,
        rotates=heads.rotates,
        num_warps=1,
    )
    return query


def gated(gate_up: Tensor) -> Tensor:
    """See `layer_functions.gated`. gate_up: contiguous."""
    tokens, both = gate_up.shape
    inner = both // 2
    out = gate_up.new_empty(tokens, inner)
    _gated[tokens, triton.cdiv(inner, COLUMNS)](gate_up, out, inner=inner, columns=COLUMNS)
    return out


FUSED = Functions(add_and_norm, rotate_and_cache, gated)


@triton.jit
def _add_and_norm(  # type: ignore[no-untyped-def]
    x, change, weight, normed, eps, size: tl.constexpr, width: tl.constexpr, adds: tl.constexpr
):
    """A token: x plus change, rounded as x is stored, and that by its root mean square, times weight."""
    column = tl.arange(0, width)
    is_inside = column < size
    at = tl.program_id(0).to(tl.int64) * size + column
    value = tl.load(x + at, is_inside, 0.0)
    if adds:
        added = value.to(tl.float32) + tl.load(change + at, is_inside, 0.0).to(tl.float32)
        value = added.to(x.dtype.element_ty)
        tl.store(x + at, value, is_inside)
    wide = value.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    rounded = scaled.to(x.dtype.element_ty).to(tl.float32)
    tl.store(normed + at, rounded * tl.load(weight + column, is_inside, 0.0).to(tl.float32), is_inside)


@triton.jit
def _rotate_and_cache(  # type: ignore[no-untyped-def]
    qkv,
    rotation,
    query_weight,
    key_weight,
    query,
    keys,
    values,
    index,
    query_eps,
    key_eps,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    half: tl.constexpr,
    width: tl.constexpr,
    norms: tl.constexpr,
    rotates: tl.constexpr,
):
    """One head of a token, in two halves: a query to `query`, a key or a value to its place in the cache."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, width)
    is_inside = column < half
    source = qkv + (token * (heads + 2 * key_heads) + head) * 2 * half
    first = tl.load(source + column, is_inside, 0.0).to(tl.float32)
    second = tl.load(source + half + column, is_inside, 0.0).to(tl.float32)
    cached = tl.load(index + token) * key_heads  # the first of its rows in the cache

    if head >= heads + key_heads:
        target = values + (cached + head - heads - key_heads) * 2 * half
    else:
        if head >= heads:
            target = keys + (cached + head - heads) * 2 * half
            weight = key_weight
            eps = key_eps
        else:
            target = query + (token * heads + head) * 2 * half
            weight = query_weight
            eps = query_eps
        if norms:
            scale = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * half) + eps)
            first = first * scale * tl.load(weight + column, is_inside, 0.0).to(tl.float32)
            second = second * scale * tl.load(weight + half + column, is_inside, 0.0).to(tl.float32)
        if rotates:
            angle = rotation + token * 4 * half + column  # a row of cosines, then one of sines, their halves alike
            cos = tl.load(angle, is_inside, 0.0)
            sin = tl.load(angle + 2 * half, is_inside, 0.0)
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned
    tl.store(target + column, first, is_inside)
    tl.store(target + half + column, second, is_inside)


@triton.jit
def _gated(gate_up, out, inner: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some values of a token: silu(gate) × up."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    is_inside = column < inner
    gate = tl.load(gate_up + token * 2 * inner + column, is_inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * inner + inner + column, is_inside, 0.0).to(tl.float32)
    rounded = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * inner + column, rounded * up, is_inside)
