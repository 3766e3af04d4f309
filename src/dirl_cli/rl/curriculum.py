"""Which problems of the endless order are asked now: those that are neither always nor never solved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dirl_cli.data.order import MixtureOrder


@dataclass(frozen=True)
class Curriculum:
    """Problems rest whose answers were last right more often than `easiest` or more rarely than `hardest`.

    skips: how many times such a problem is passed over before it is asked again; what was too hard may no longer be.
    """

    hardest: float
    easiest: float
    skips: int

    def indices(
        self, order: MixtureOrder, start: int, number: int, rests_until: Mapping[int, int]
    ) -> tuple[list[int], int]:
        """The next so many indices of the order whose problems do not rest, and where it goes on.

        rests_until: by problem, the index of the order before which it is passed over.
        """
        selected: list[int] = []
        index = start
        while len(selected) < number:  # the order is endless, and no rest is
            if rests_until.get(order[index], 0) <= index:
                selected.append(index)
            index += 1
        return selected, index

    def rests(self, order: MixtureOrder, indices: Sequence[int], pass_rates: Sequence[float | None]) -> dict[int, int]:
        """By problem, until when those just asked rest; 0 for those that do not. None where nothing was answered."""
        epoch = sum(order.sizes)
        rests_until = {}
        for index, pass_rate in zip(indices, pass_rates, strict=True):
            if pass_rate is not None:
                if self.hardest <= pass_rate <= self.easiest:
                    rests_until[order[index]] = 0
                else:  # it comes up once in each epoch
                    rests_until[order[index]] = (index // epoch + 1 + self.skips) * epoch
        return rests_until


EVERYTHING = Curriculum(hardest=0.0, easiest=1.0, skips=0)
