"""What every engine offers: prompts in, trajectories out, weights replaced between calls."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Decoding, Trajectory

Watch = Callable[[int, int, list[int]], None]
"""Called after each forward with prompt index, sample index and the tokens so far, the mask token where masked."""

Hint = Mapping[int, int]
"""Tokens that are held in an answer, which stand there from the start: by their index in it, the token id."""


class Sampler(Protocol):
    """An engine; `rollout/native.py` is the one that runs anywhere."""

    lm: DiffusionLM
    weights_version: int

    def stream(
        self,
        prompts: Sequence[list[int]],
        n: int,
        decoding: Decoding,
        first: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        watch: Watch | None = None,
        hints: Sequence[Sequence[Hint]] | None = None,
    ) -> Iterator[tuple[int, int, Trajectory]]:
        """Sample `n` answers to each prompt; yields (prompt index, sample index, trajectory) as they finish.

        An answer depends on its prompt, seed and sample index, not on what else is sampled: a prompt that is given
        twice gets the same answers twice, unless `seeds` tell them apart.
        first: the sample index each prompt's answers start from (default 0), to ask for missing ones only; a
            prompt then gets those from first[i] up to `n`.
        seeds: one per prompt, in place of decoding.seed.
        hints: for each prompt one per answer, in order; what follows the answer's end of it is left out.
        """
        ...

    def sample(self, prompts: Sequence[list[int]], n: int, decoding: Decoding) -> list[list[Trajectory]]:
        """Sample likewise and wait for all: `n` trajectories for each prompt, in order."""
        ...

    def set_block_size(self, block_size: int) -> None:
        """Sample in blocks of this size from now on, whatever the model's own is. No stream may be open."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample with these weights from now on; trajectories carry `version`."""
        ...

    def sleep(self) -> None:
        """Give the device's memory back until `wake`."""
        ...

    def wake(self) -> None:
        """Take it again after `sleep`; with `own_weights`, `update_weights` has to follow."""
        ...


def collect_samples(stream: Iterable[tuple[int, int, Trajectory]], prompts: int, n: int) -> list[list[Trajectory]]:
    """All that `Sampler.stream` yields for `prompts` prompts, `n` trajectories each, in order."""
    by_index = {(prompt, sample): trajectory for prompt, sample, trajectory in stream}
    answers = []
    for prompt in range(prompts):
        answers.append([by_index[prompt, sample] for sample in range(n)])
    return answers
