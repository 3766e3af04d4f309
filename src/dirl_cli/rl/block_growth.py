"""Blocks that grow while a policy is reinforced (T★, arXiv 2601.11214): which size each step samples and learns in.

A step's answers are sampled, rewarded and scored in blocks of its size, and so is what is measured after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dirl_cli.models.load import DiffusionLM
from dirl_cli.training.block_stages import BlockStages


@dataclass(frozen=True)
class BlockGrowth:
    """The block sizes to begin with; then blocks have the model's own size. stages: of each its end and size.

    The end is the first step, from 0, that has another size. measured: stages whose ends evaluations tell, instead.
    """

    stages: tuple[tuple[int, int], ...] = ()
    measured: BlockStages | None = None

    @classmethod
    def of(cls, sizes: Sequence[int], final: int) -> "BlockGrowth":
        """The growth in which step i has sizes[i], and the model in the end `final`."""
        stages = []
        for step, (size, following) in enumerate(zip(sizes, [*sizes[1:], final], strict=True)):
            if following != size:
                stages.append((step + 1, size))
        return cls(tuple(stages))

    def at(self, lm: DiffusionLM, step: int) -> DiffusionLM:
        """The model in the blocks of a step, from 0. lm: in those of its own size."""
        if self.measured:
            size = self.measured.size(step)
            return lm if size == lm.block_size else replace(lm, block_size=size)
        for end, size in self.stages:
            if step < end:
                return replace(lm, block_size=size)
        return lm

    def __str__(self) -> str:
        """Such as: blocks of 4 up to step 30, of 8 up to step 60."""
        if self.measured:
            return str(self.measured)
        return "blocks " + ", ".join(f"of {size} up to step {end}" for end, size in self.stages)


NO_GROWTH = BlockGrowth()
