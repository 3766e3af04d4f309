"""What every engine offers: prompts in, trajectories out, weights replaced between calls."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Decoding, StopReason, Trajectory

Watch = Callable[[int, int, list[int]], None]
"""Called after each forward with prompt index, sample index and the tokens so far, the mask token where masked."""

Hint = Mapping[int, int]
"""Tokens that are held in an answer, which stand there from the start: by their index in it, the token id."""


@dataclass
class Stint:
    """Which answers a stream waits for, and what there is of the others: they are gone on with in another stream.

    waited_for: prompts, the first ones, whose answers all have to be there. more: how many answers to the others, too.
    finished: by prompt and sample, answers that are there already and not asked for. under_way: what there is of
    others, in whole blocks, which a stream begins with; at its end, of those that it leaves under way. Their
    `stop_reason` says nothing.
    """

    waited_for: int
    more: int = 0
    finished: Collection[tuple[int, int]] = ()
    under_way: dict[tuple[int, int], Trajectory] = field(default_factory=dict)

    def begin(self, asked: Iterable[tuple[int, int]]) -> "Remaining":
        """What a stream has to wait for, of the answers that it is asked for."""
        waited_for = {key for key in asked if key[0] < self.waited_for}
        return Remaining(waited_for, self.more)


@dataclass
class Remaining:
    """What a stream still waits for: some answers, and a number of others."""

    waited_for: set[tuple[int, int]]
    more: int

    def take(self, prompt: int, sample: int) -> None:
        """An answer has ended."""
        if (prompt, sample) in self.waited_for:
            self.waited_for.remove((prompt, sample))
        else:
            self.more -= 1

    @property
    def is_over(self) -> bool:
        return not self.waited_for and self.more <= 0


def continued(so_far: Trajectory | None, rest: Trajectory) -> Trajectory:
    """A whole answer, of what there was of it and what a stream has sampled to it."""
    if so_far is None:
        return rest
    versions = [*so_far.token_versions, *rest.token_versions]
    is_recorded = bool(so_far.entropies and rest.entropies)  # a run may go on with another choice
    return replace(
        rest,
        token_ids=[*so_far.token_ids, *rest.token_ids],
        reveal_step=[*so_far.reveal_step, *rest.reveal_step],
        logprobs=[*so_far.logprobs, *rest.logprobs],
        entropies=[*so_far.entropies, *rest.entropies] if is_recorded else [],
        denoise_forwards=so_far.denoise_forwards + rest.denoise_forwards,
        forwards=so_far.forwards + rest.forwards,
        weights_version=versions[0],
        versions=versions if len(set(versions)) > 1 else [],
    )


@dataclass(frozen=True)
class NewBlock:
    """A block that an answer of a `LiveBatch` has grown by.

    prompt, sample: as they were given to `add`. token_ids, reveal_step, logprobs: of the block's tokens, the prompt's
    left out. denoise_forwards, forwards: of the answer so far. stop_reason: of its last block, which may hold nothing.
    """

    prompt: int
    sample: int
    token_ids: list[int]
    reveal_step: list[int]
    logprobs: list[float]
    denoise_forwards: int
    forwards: int
    weights_version: int
    stop_reason: StopReason | None


@dataclass(frozen=True)
class GivenUp:
    """An answer of a `LiveBatch` that its engine does not end. reason: a sentence."""

    prompt: int
    sample: int
    reason: str


class LiveBatch(Protocol):
    """Answers that are sampled side by side, which others join and leave between forwards: what a server asks.

    An answer is the one that `Sampler.stream` gives, whatever else is in the batch. Its sampler is used for nothing
    else until it is closed, and so has one version of the weights.
    slots: answers at once. length: tokens of a prompt and its answer at most.
    """

    slots: int
    length: int

    def has_room(self, decoding: Decoding) -> bool:
        """Whether an answer that is decoded so may be added now."""
        ...

    def add(
        self, prompt: int, sample: int, prompt_ids: list[int], decoding: Decoding, answer_ids: Sequence[int] = ()
    ) -> None:
        """Begin an answer; it depends on its tokens, decoding.seed and sample index alone.

        prompt: a number that answers to the same prompt share; what is computed of it is computed once. answer_ids:
        whole blocks that it has already and goes on from; of these it tells nothing.
        """
        ...

    def remove(self, prompt: int, sample: int) -> None:
        """Drop an answer; nothing more is told of it."""
        ...

    def step(self) -> list[NewBlock | GivenUp]:
        """Go on for a moment, a forward or so; what has become full. Only where there is an answer under way."""
        ...

    def close(self) -> None:
        """End it; whatever is under way is dropped."""
        ...


def cut_to(decoding: Decoding, prompt_ids: list[int], length: int) -> Decoding:
    """The same decoding, its answer no longer than leaves room for the prompt in `length` tokens.

    Raises DirlError where that is no token.
    """
    room = length - len(prompt_ids)
    if room < 1:
        raise DirlError(f"a prompt has {len(prompt_ids)} tokens and there is room for {length - 1}: shorten it")
    if decoding.max_new_tokens <= room:
        return decoding
    return replace(decoding, max_new_tokens=room)


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
        stint: Stint | None = None,
    ) -> Iterator[tuple[int, int, Trajectory]]:
        """Sample `n` answers to each prompt; yields (prompt index, sample index, trajectory) as they finish.

        An answer depends on its prompt, seed and sample index, not on what else is sampled: a prompt that is given
        twice gets the same answers twice, unless `seeds` tell them apart.
        first: the sample index each prompt's answers start from (default 0), to ask for missing ones only; a
            prompt then gets those from first[i] up to `n`.
        seeds: one per prompt, in place of decoding.seed.
        hints: for each prompt one per answer, in order; what follows the answer's end of it is left out.
        stint: which answers end the stream; None for all. An answer that goes on from whole blocks is the one that it
            would have been, but for what newer weights draw: keys and values are computed anew.
        """
        ...

    def sample(self, prompts: Sequence[list[int]], n: int, decoding: Decoding) -> list[list[Trajectory]]:
        """Sample likewise and wait for all: `n` trajectories for each prompt, in order."""
        ...

    def open_batch(self, length: int) -> "LiveBatch":
        """Begin to answer whatever comes, with room for `length` tokens of each prompt and its answer, whole blocks."""
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
