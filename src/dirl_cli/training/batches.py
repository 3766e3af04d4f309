"""The batches of a fine-tuning run: batch n is the same whenever and wherever it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Generator

from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.masking import Example, Masking, noised_rows


@dataclass(frozen=True)
class Noise:
    """How demonstrations become packed rows. row_tokens: the most tokens of a row, unless one alone is longer."""

    masking: Masking
    block_size: int
    mask_id: int
    pad_id: int
    row_tokens: int

    def rows(self, examples: Sequence[Example], *seed: int) -> tuple[Rows, int]:
        """Packed rows of freshly masked examples, and their number of answer tokens."""
        return noised_rows(
            examples, self.masking, self.block_size, self.mask_id, self.pad_id, self.row_tokens, generator(*seed)
        )


@dataclass(frozen=True)
class NoisedBatches:
    """Batch by step: `batch_size` demonstrations in an order that is new in every epoch, freshly masked."""

    examples: Sequence[Example]
    batch_size: int
    noise: Noise
    seed: int

    def __getitem__(self, step: int) -> tuple[Rows, int]:
        chosen = [self.examples[i] for i in self.order(step)]
        return self.noise.rows(chosen, self.seed, step)

    def order(self, step: int) -> list[int]:
        """Which examples make batch `step`, in which one epoch may end and the next begin."""
        first, n = step * self.batch_size, len(self.examples)
        places = range(first, first + self.batch_size)
        epochs = {place // n for place in places}
        shuffled = {epoch: torch.randperm(n, generator=generator(self.seed, epoch, n)) for epoch in epochs}
        return [int(shuffled[place // n][place % n]) for place in places]


def generator(*numbers: int) -> Generator:
    """A generator whose draws depend on all the numbers and their order."""
    digest = blake2b(repr(numbers).encode(), digest_size=7).digest()
    return Generator().manual_seed(int.from_bytes(digest))
