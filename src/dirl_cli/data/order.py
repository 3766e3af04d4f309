"""The order in which examples come up: endless, seeded, mixed by weight, and the same wherever it is entered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b

import torch
from torch import Generator, Tensor

LONGEST_ROUND = 1000  # places, so that shares are kept to a thousandth


@dataclass(frozen=True)
class Order:
    """Which example stands at each place, examples being numbered through all sources.

    Each round of places holds an exact share of every source, in an order of its own; each source comes in epochs of
    its own, every example once in each and shuffled anew.

    sizes, weights: of the sources. seeded: a generator whose draws depend on the numbers it is given.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seeded: Callable[..., Generator]

    def __getitem__(self, place: int) -> int:
        turn, i = divmod(place, len(self._round))
        source = int(self._arranged(turn)[i])
        epoch, i = divmod(self.drawn(place)[source], self.sizes[source])
        size = self.sizes[source]
        numbers = (epoch, size, source) if source else (epoch, size)
        return sum(self.sizes[:source]) + int(shuffled(self.seeded, size, *numbers)[i])

    def drawn(self, place: int) -> list[int]:
        """How many examples of each source stand before a place."""
        turn, i = divmod(place, len(self._round))
        before = torch.bincount(self._arranged(turn)[:i], minlength=len(self.sizes))
        whole = torch.bincount(self._round, minlength=len(self.sizes))
        return (turn * whole + before).tolist()

    def epochs(self, place: int) -> list[float]:
        """How often each source has been gone through before a place."""
        return [drawn / size for drawn, size in zip(self.drawn(place), self.sizes, strict=True)]

    @cached_property
    def _round(self) -> Tensor:
        """The source of each place of a round: the shortest that holds the shares exactly, if there is one."""
        shares = torch.tensor(self.weights, dtype=torch.double) / sum(self.weights)
        parts = torch.arange(1, LONGEST_ROUND + 1)[:, None] * shares  # (length, source)
        exact = ((parts.round() - parts).abs() < 1e-6).all(1) & (parts > 0.5).all(1)
        best = int(exact.nonzero()[0]) if exact.any() else -1
        return torch.arange(len(shares)).repeat_interleave(parts[best].round().long().clamp(min=1))

    def _arranged(self, turn: int) -> Tensor:
        length = len(self._round)
        return self._round if length == 1 else self._round[shuffled(self.seeded, length, turn, length, 0, 0)]


@lru_cache(maxsize=32)
def shuffled(seeded: Callable[..., Generator], size: int, *numbers: int) -> Tensor:
    """The numbers below `size` in an order that depends on `numbers`. Returns (size,)."""
    return torch.randperm(size, generator=seeded(*numbers))


def generator(*numbers: int) -> Generator:
    """A generator whose draws depend on all the numbers and their order."""
    digest = blake2b(repr(numbers).encode(), digest_size=7).digest()
    return Generator().manual_seed(int.from_bytes(digest))


def epochs(order: Order, names: Sequence[str], place: int) -> dict[str, float]:
    """How often each source has been gone through before a place, as metrics."""
    parts = [f"epoch/{name}" for name in names] if len(names) > 1 else ["epoch"]
    return dict(zip(parts, order.epochs(place), strict=True))
