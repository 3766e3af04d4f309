"""What a sampler is asked for, one request a completion, whichever engine answers it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from dirl_cli.diffusion.sampling import request_key
from dirl_cli.errors import DirlError
from dirl_cli.rollout.sampler import Hint
from dirl_cli.types import Decoding


@dataclass(frozen=True)
class Request:
    """One completion to sample. prompt, sample: their indices. key: seed of its randomness (`request_key`).

    answer_ids: what it has already, in whole blocks; what is sampled begins after that.
    """

    prompt: int
    sample: int
    prompt_ids: list[int]
    decoding: Decoding
    key: int
    hint: Hint = field(default_factory=dict)
    answer_ids: Sequence[int] = ()

    @property
    def prefix(self) -> tuple[int, int]:
        """What answers have in common that begin with the same tokens: a prompt, or an answer's own beginning."""
        return self.prompt, self.sample if self.answer_ids else -1


def make_requests(
    prompts: Sequence[list[int]],
    n: int,
    decoding: Decoding,
    first: Sequence[int] | None,
    seeds: Sequence[int] | None,
    hints: Sequence[Sequence[Hint]] | None = None,
) -> list[Request]:
    """The requests of a call of `Sampler.stream`, one a completion, in order."""
    requests = []
    for i, prompt_ids in enumerate(prompts):
        seed = seeds[i] if seeds else decoding.seed
        first_sample = first[i] if first else 0
        for sample in range(first_sample, n):
            hint = hints[i][sample] if hints else {}
            key = request_key(seed, prompt_ids, sample)
            requests.append(Request(i, sample, prompt_ids, decoding, key, hint))
    return requests


@lru_cache(maxsize=64)
def rule_of(decoding: Decoding) -> Decoding:
    """How tokens are drawn and revealed: the same decoding without what differs between requests that share a forward.

    That is where an answer ends, and its seed.
    """
    return replace(decoding, max_new_tokens=1, stop_token_ids=(), seed=0)


def require_free_end(hint: Hint, longest: int, stop_token_ids: Sequence[int]) -> None:
    """Raises DirlError for a hint that leaves the sampler nothing to do, or that ends the answer itself.

    longest: tokens that the answer may have.
    """
    last = max(hint, default=-1)
    if last >= longest - 1:
        raise DirlError(f"a hint holds token {last + 1} of an answer of at most {longest}: leave the last one free")
    if not set(stop_token_ids).isdisjoint(hint.values()):
        raise DirlError("a hint holds a stop token, with which an answer ends: cut the hint before it")
