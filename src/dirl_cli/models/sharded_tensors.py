"""Tensors of which every process holds a shard: the full one of its shards, and a process's shard of a full one."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share any parameter of the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. Every process has to call, one after the other for the same tensors: gathering is collective."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def unsharded(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, one by one as full tensors. Every process has to iterate over all: gathering is collective."""
    for name, tensor in named:
        yield name, full_tensor(tensor)


def own_shard(full: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What this process holds of `target`, and the same of a full tensor of its shape. Nothing is sent."""
    if not isinstance(target, DTensor):
        return target, full
    own = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
    return target.to_local(), own.to_local()


@torch.no_grad()
def fill(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy full tensors into the parameters of their names, or into what this process holds of these.

    Raises KeyError where the names of the two differ: a parameter would stay what it was, in silence.
    """
    parameters = dict(model.named_parameters())
    for name, weight in weights:
        target, own = own_shard(weight, parameters.pop(name))
        target.copy_(own)
    if parameters:
        raise KeyError(f"there is no weight for {min(parameters)}")
