"""Tensors in safetensors files, of which every process writes and reads the shard that it holds.

A shard is a box of the full tensor: it begins at `begin` and is as large as its values. A file says of each tensor of
which it holds a shard only where that begins and which shape the full tensor has, so that any number of processes can
read what any other number wrote.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dirl_cli.errors import DirlError

SHARDS = "parts"  # the key in a file's metadata, under a name that earlier versions wrote


@dataclass(frozen=True)
class Shard:
    """What this process holds of a tensor. begin: its first index in each dimension. shape: the full tensor's."""

    values: Tensor
    begin: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "Shard":
        """This process's shard of a distributed tensor, or all of any other."""
        tensor = tensor.detach()
        shape = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            return Shard(tensor, (0,) * tensor.ndim, shape)
        _, begin = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return Shard(tensor.to_local(), tuple(begin), shape)

    def copy(self) -> "Shard":
        """A copy in the CPU's memory, which training does not change."""
        return replace(self, values=self.values.to("cpu", copy=True))

    @property
    def ranges(self) -> list[range]:
        """The indices it covers, dimension by dimension."""
        return index_ranges(self.begin, self.values.shape)


def index_ranges(begin: Iterable[int], sizes: Iterable[int]) -> list[range]:
    return [range(first, first + size) for first, size in zip(begin, sizes, strict=True)]


def write_shards(file: Path, shards: Mapping[str, Shard]) -> None:
    """Write a safetensors file of shards by name."""
    begin_and_shape = {}
    for name, shard in shards.items():
        if shard.values.shape != shard.shape:
            begin_and_shape[name] = [shard.begin, shard.shape]
    tensors = {name: shard.values.contiguous() for name, shard in shards.items()}
    save_file(tensors, file, {SHARDS: json.dumps(begin_and_shape)})


def stored_shapes(files: Iterable[Path]) -> dict[str, torch.Size]:
    """The full shape of every tensor in some files."""
    shapes: dict[str, torch.Size] = {}
    for file in files:
        with safe_open(file, "pt") as content:
            begin_and_shape = json.loads(content.metadata()[SHARDS])
            for name in content.keys():  # noqa: SIM118  # it is no dictionary
                if name in begin_and_shape:
                    _, shape = begin_and_shape[name]
                else:
                    shape = content.get_slice(name).get_shape()
                shapes[name] = torch.Size(shape)
    return shapes


def read_shards(files: Sequence[Path], tensors: Mapping[str, Tensor]) -> None:
    """Copy into each tensor, or into what this process holds of it, what the files hold under its name.

    Raises DirlError where one is missing or has another shape.
    """
    shapes = stored_shapes(files)
    for name, tensor in tensors.items():
        if shapes.get(name) != tensor.shape:
            problem = "not at all"
            if name in shapes:
                problem = f"with shape {tuple(shapes[name])}, not {tuple(tensor.shape)}"
            raise DirlError(f"{files[0].parent} holds {name} {problem}: it is a checkpoint of another model")

    # Each process looks into every file: another number of processes may have cut the tensors elsewhere.
    targets = {name: Shard.of(tensor) for name, tensor in tensors.items()}
    for file in files:
        with safe_open(file, "pt") as content:
            begin_and_shape = json.loads(content.metadata()[SHARDS])
            for name in targets.keys() & set(content.keys()):
                source = content.get_slice(name)
                sizes = source.get_shape()
                begin = begin_and_shape[name][0] if name in begin_and_shape else [0] * len(sizes)
                copy_overlap(source, index_ranges(begin, sizes), targets[name])


def copy_overlap(source: Any, source_ranges: Sequence[range], target: Shard) -> None:
    """Copy what a stored slice and a shard have in common; source_ranges: the indices that the slice covers."""
    read, write = [], []
    for stored, held in zip(source_ranges, target.ranges, strict=True):
        first = max(stored.start, held.start)
        last = min(stored.stop, held.stop)
        if first >= last:
            return
        read.append(slice(first - stored.start, last - stored.start))
        write.append(slice(first - held.start, last - held.start))
    target.values[tuple(write)].copy_(source[tuple(read)])
