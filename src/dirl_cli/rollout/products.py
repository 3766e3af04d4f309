"""Products of tokens with a weight: torch's, or on a CPU oneDNN's with a weight in its own order.

Shapes: T tokens of I values each, O values that come out.
"""

import platform
from typing import Annotated, Protocol

import torch
from torch import Tensor, nn

from dirl_cli.ranges import OneOf

Products = Annotated[str, OneOf("auto", "plain", "reordered")]
"""Of which weights a sampler on a CPU keeps reordered copies: the large ones, none, or all that it can."""

WORTH_REORDERING = 2**18  # values of a weight; of smaller ones oneDNN takes longer to begin than to multiply


class Product(Protocol):
    """x Wᵀ + b: (T, I) to (T, O)."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def renew(self) -> None:
        """Follow a weight that was changed in place."""
        ...


class PlainProduct:
    """A product with a weight (O, I) as it lies, and a bias (O,)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def renew(self) -> None:
        """It reads the weight itself."""


class ReorderedProduct:
    """A product with a copy of the weight in the order in which oneDNN reads it.

    Libraries that read it as it lies reorder it in every product: with few tokens that takes longer than to multiply.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.renew()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.reordered, self.bias, "none", [], "")

    def renew(self) -> None:
        self.reordered = torch.ops.mkldnn._reorder_linear_weight(self.weight)


def product(weight: Tensor, bias: Tensor | None, products: Products) -> Product:
    """The product with a weight (O, I) and a bias (O,), if there is one.

    Which it is depends on nothing but the kind of machine, the dtype and the shape, and not on a measurement: the two
    round differently, and a run that goes on after a stop has to come to the same bytes.
    """
    if weight.device.type == "cpu" and is_reordered(weight.numel(), weight.dtype, products):
        return ReorderedProduct(weight, bias)
    return PlainProduct(weight, bias)


def is_reordered(values: int, dtype: torch.dtype, products: Products) -> bool:
    """Whether a weight of so many values is reordered, if it is on the CPU of this machine."""
    if products == "plain" or (products == "auto" and values < WORTH_REORDERING):
        return False
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32
