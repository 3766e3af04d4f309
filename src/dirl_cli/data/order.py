"""The order in which examples come up: endless, seeded, mixed by weight, and the same wherever it is entered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b

import torch
from torch import Generator, Tensor

LONGEST_ROUND = 1000  # examples in a round, so that the sources' shares are kept to a thousandth


@dataclass(frozen=True)
class MixtureOrder:
    """An endless sequence of example numbers: `order[index]` for any index from 0 on, without a state to keep.

    The order is made of rounds. Each round holds an exact share of every source, shuffled anew. Each source is gone
    through in epochs of its own: every example once in each, shuffled anew.

    sizes, weights: of the sources. An example's number counts through all sources, the second after the first.
    seeded: a generator whose draws depend on the numbers it is given.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seeded: Callable[..., Generator]

    def __getitem__(self, index: int) -> int:
        round_number, position = divmod(index, len(self._round))
        source = int(self._arranged(round_number)[position])
        size = self.sizes[source]

        epoch, position = divmod(self.counts_before(index)[source], size)
        # The first source's seed leaves its number out: the orders of runs on a single source stay what they were.
        seed = (epoch, size, source) if source else (epoch, size)
        return sum(self.sizes[:source]) + int(shuffled(self.seeded, size, *seed)[position])

    def counts_before(self, index: int) -> list[int]:
        """How many examples of each source stand before an index."""
        rounds, position = divmod(index, len(self._round))
        in_round = torch.bincount(self._round, minlength=len(self.sizes))  # (sources,)
        in_this_round = torch.bincount(self._arranged(rounds)[:position], minlength=len(self.sizes))  # (sources,)
        return (rounds * in_round + in_this_round).tolist()

    def epochs(self, index: int) -> list[float]:
        """How often each source has been gone through before an index."""
        return [count / size for count, size in zip(self.counts_before(index), self.sizes, strict=True)]

    @cached_property
    def _round(self) -> Tensor:
        """The source of each example of a round, unshuffled: (length,).

        The length is the shortest at which every source's share is a whole number of examples, or LONGEST_ROUND with
        rounded shares where no length up to that will do.
        """
        shares = torch.tensor(self.weights, dtype=torch.double) / sum(self.weights)
        counts = torch.arange(1, LONGEST_ROUND + 1)[:, None] * shares  # (lengths, sources)
        is_exact = ((counts.round() - counts).abs() < 1e-6).all(1) & (counts > 0.5).all(1)  # (lengths,)
        row = -1
        if is_exact.any():
            row = int(is_exact.nonzero()[0])
        repeats = counts[row].round().long().clamp(min=1)  # (sources,); a source of the smallest share comes up, too
        return torch.arange(len(shares)).repeat_interleave(repeats)

    def _arranged(self, round_number: int) -> Tensor:
        """The source of each example of a round, as this round arranges them: (length,)."""
        length = len(self._round)
        if length == 1:
            return self._round
        # The zeros keep these draws apart from those that shuffle a source, which have two or three numbers.
        return self._round[shuffled(self.seeded, length, round_number, length, 0, 0)]


@lru_cache(maxsize=32)
def shuffled(seeded: Callable[..., Generator], size: int, *numbers: int) -> Tensor:
    """The numbers below `size` in an order that depends on `numbers`. Returns (size,)."""
    return torch.randperm(size, generator=seeded(*numbers))


def generator(*numbers: int) -> Generator:
    """A generator whose draws depend on all the numbers and their order."""
    digest = blake2b(repr(numbers).encode(), digest_size=7).digest()
    return Generator().manual_seed(int.from_bytes(digest))


def epochs(order: MixtureOrder, names: Sequence[str], index: int) -> dict[str, float]:
    """How often each source has been gone through before an index, as metrics.

    names: of the sources; where there is one, the metric does without.
    """
    metrics = ["epoch"]
    if len(names) > 1:
        metrics = [f"epoch/{name}" for name in names]
    return dict(zip(metrics, order.epochs(index), strict=True))
