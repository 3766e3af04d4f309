"""Tensors in safetensors files, of which every process writes and reads the part that it holds."""

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

PARTS = "parts"  # in a file's metadata: where a tensor begins that it holds a part of, and the whole's shape


@dataclass(frozen=True)
class Part:
    """What this process holds of a tensor. begin: where in the whole it lies. shape: the whole's."""

    values: Tensor
    begin: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "Part":
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return Part(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
        _, begin = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return Part(tensor.to_local(), tuple(begin), tuple(tensor.shape))

    def copy(self) -> "Part":
        """One that training does not change, in the CPU's memory."""
        return replace(self, values=self.values.to("cpu", copy=True))

    @property
    def ranges(self) -> list[range]:
        return ranges(self.begin, self.values.shape)


def ranges(begin: Iterable[int], sizes: Iterable[int]) -> list[range]:
    return [range(at, at + size) for at, size in zip(begin, sizes, strict=True)]


def write_parts(file: Path, parts: Mapping[str, Part]) -> None:
    where = {name: [part.begin, part.shape] for name, part in parts.items() if part.values.shape != part.shape}
    tensors = {name: part.values.contiguous() for name, part in parts.items()}
    save_file(tensors, file, {PARTS: json.dumps(where)})


def stored_shapes(files: Iterable[Path]) -> dict[str, torch.Size]:
    """The whole shape of every tensor in some files."""
    found: dict[str, torch.Size] = {}
    for file in files:
        with safe_open(file, "pt") as content:
            where = json.loads(content.metadata()[PARTS])
            for name in content.keys():  # noqa: SIM118  # it is no dictionary
                found[name] = torch.Size(where[name][1] if name in where else content.get_slice(name).get_shape())
    return found


def read_parts(files: Sequence[Path], tensors: Mapping[str, Tensor]) -> None:
    """Copy into each tensor, or into what this process holds of it, what the files hold under its name.

    Raises DirlError where one is not there or has another shape.
    """
    shapes = stored_shapes(files)
    for name, tensor in tensors.items():
        if shapes.get(name) != tensor.shape:
            found = f"with shape {tuple(shapes[name])}, not {tuple(tensor.shape)}" if name in shapes else "not at all"
            raise DirlError(f"{files[0].parent} holds {name} {found}: it is a checkpoint of another model")
    parts = {name: Part.of(tensor) for name, tensor in tensors.items()}
    for file in files:
        with safe_open(file, "pt") as content:
            where = json.loads(content.metadata()[PARTS])
            for name in parts.keys() & set(content.keys()):
                source, own = content.get_slice(name), parts[name]
                sizes = source.get_shape()
                there = ranges(where[name][0] if name in where else [0] * len(sizes), sizes)
                copy_common(source, there, own)


def copy_common(source: Any, there: Sequence[range], own: Part) -> None:
    """Copy what a stored slice, which lies at `there`, has in common with `own`."""
    common = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(there, own.ranges, strict=True)]
    if all(common):
        to, of = (
            tuple(slice(c.start - a.start, c.stop - a.start) for c, a in zip(common, at, strict=True))
            for at in (own.ranges, there)
        )
        own.values[to].copy_(source[of])
