"""Process rewards: what the denoising steps of an answer earn, or its blocks, beside what the whole answer does."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RevealedBlock:
    """A block of an answer as it was filled. text: of its tokens. steps: what each of its denoising steps revealed.

    Tokens are in the order in which they stand. What follows the stop token is there, and special tokens are empty.
    A hint's tokens are in the text and in no step.
    """

    text: str
    steps: tuple[tuple[str, ...], ...]


def by_step(values: Sequence[float], steps: Sequence[int]) -> list[float]:
    """The value of each denoising step, from those of all steps or of all blocks, whose last steps have them then.

    A block without steps, which was held whole, leaves its value to nobody. steps: how many each block has.
    Raises ValueError for another number of values.
    """
    if len(values) == sum(steps):
        return list(values)
    if len(values) != len(steps):
        raise ValueError(f"{len(values)} values for {len(steps)} blocks and {sum(steps)} denoising steps")
    rewards: list[float] = []
    for value, count in zip(values, steps, strict=True):
        if count:
            rewards += [0.0] * (count - 1) + [value]
    return rewards
