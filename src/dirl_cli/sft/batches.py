"""The batches of a fine-tuning run: batch n is the same whenever and wherever it is asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dirl_cli.data.order import MixtureOrder, epochs, generator
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.masking import Example, Masking, example, noised_rows
from dirl_cli.diffusion.reveal_order import TraceWindows


@dataclass(frozen=True)
class Noise:
    """How demonstrations become packed rows. row_tokens: the most tokens of a row, unless one alone is longer."""

    masking: Masking | TraceWindows
    block_size: int
    mask_id: int
    pad_id: int
    row_tokens: int

    def rows(self, examples: Sequence[Example], *seed: int) -> tuple[Rows, int]:
        """Packed rows of freshly masked examples, and their number of answer tokens."""
        return noised_rows(
            examples, self.masking, self.block_size, self.mask_id, self.pad_id, self.row_tokens, generator(*seed)
        )


class Tokens(Protocol):
    """Demonstrations, each as its token ids and which of them are trained; of sampled ones also when each came up."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> tuple[list[int], list[bool]]: ...
    def revealed_at(self, i: int, /) -> list[int] | None: ...


class Examples(Protocol):
    def __getitem__(self, i: int, /) -> Example: ...


@dataclass(frozen=True)
class Padded:
    """Demonstrations of several sources one after another, each made whole blocks when it is asked for."""

    sources: Sequence[Tokens]
    block_size: int
    pad_id: int

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, i: int) -> Example:
        for source in self.sources:
            if i < len(source):
                return example(*source[i], self.block_size, self.pad_id, source.revealed_at(i))
            i -= len(source)
        raise IndexError


@dataclass(frozen=True)
class NoisedBatches:
    """Batch by step: the next `batch_size` demonstrations in their order, freshly masked.

    noise: that of a step. sources: the names of what the demonstrations come from.
    """

    examples: Examples
    order: MixtureOrder
    batch_size: int
    noise: Callable[[int], Noise]
    seed: int
    sources: Sequence[str] = ("",)

    def __getitem__(self, step: int) -> tuple[Rows, int]:
        return self.noise(step).rows(list(self.demonstrations(step)), self.seed, step)

    def demonstrations(self, step: int) -> Iterator[Example]:
        """Those of batch `step`, each made when it is asked for."""
        return (self.examples[i] for i in self.chosen(step))

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each source has been gone through after so many steps, as metrics."""
        return epochs(self.order, self.sources, steps * self.batch_size)

    def chosen(self, step: int) -> list[int]:
        """Which examples make batch `step`, in which one epoch may end and the next begin."""
        first = step * self.batch_size
        return [self.order[place] for place in range(first, first + self.batch_size)]
