"""Log-likelihoods of texts in nats, from left to right or by the ELBO, and whether greedy decoding says them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from statistics import fmean
from typing import Annotated

from dirl_cli.data.order import generator
from dirl_cli.models.load import DiffusionLM
from dirl_cli.ranges import Count, OneOf, Seed, require_fields
from dirl_cli.training.text_likelihood import MaskDraws, Text, evidence_bound, left_to_right

LIKELIHOODS = ("left_to_right", "elbo")
BATCH_TOKENS = 8192  # of texts that are scored at once


@dataclass(frozen=True)
class Scoring:
    """How log-likelihoods are computed: exactly left to right, or by the ELBO; see training/text_likelihood.py."""

    likelihood: Annotated[str, OneOf(*LIKELIHOODS)] = "left_to_right"
    draws: Count = 8
    rates: Count = 4
    row_tokens: Count = 2048
    seed: Seed = 0

    def __post_init__(self) -> None:
        require_fields(self, "scoring")


class TextScorer:
    """Scores texts with a model. Those with the same context, as the choices of a question, get the same masks.

    Whether a text is greedy is told of decoding from left to right, whichever `scoring` is asked for.
    """

    def __init__(self, lm: DiffusionLM, scoring: Scoring) -> None:
        self.lm = lm
        self.scoring = scoring
        self._standard_errors: list[float] = []  # of the ELBOs, in nats

    @property
    def standard_error(self) -> float | None:
        """The mean standard error of the ELBOs so far, in nats; None where there is none."""
        return fmean(self._standard_errors) if self._standard_errors else None

    def score(self, texts: Sequence[Text], contexts: Sequence[str]) -> Iterator[tuple[float, bool]]:
        """Yield (log-likelihood, whether greedy) of each text. contexts: what stands before it, which decides masks."""
        for batch in consecutive(texts, BATCH_TOKENS):
            yield from self._score_batch(texts[batch], contexts[batch])

    def _score_batch(self, texts: Sequence[Text], contexts: Sequence[str]) -> list[tuple[float, bool]]:
        scoring = self.scoring
        exact = left_to_right(self.lm, texts, scoring.row_tokens)
        greedy = [all(logprobs.likeliest) for logprobs in exact]
        if scoring.likelihood == "left_to_right":
            nats = [logprobs.total for logprobs in exact]
        else:
            masks = MaskDraws(scoring.draws, scoring.rates)
            generators = [generator(scoring.seed, number_of(context)) for context in contexts]
            bounds = evidence_bound(self.lm, texts, masks, generators, scoring.row_tokens)
            nats = [bound.mean for bound in bounds]
            self._standard_errors += [bound.standard_error for bound in bounds if bound.standard_error is not None]
        return list(zip(nats, greedy, strict=True))


def consecutive(texts: Sequence[Text], tokens: int) -> Iterator[slice]:
    """Slices of neighbouring texts, each of about so many tokens."""
    first = 0
    size = 0
    for i, text in enumerate(texts):
        size += len(text.token_ids)
        if size >= tokens or i == len(texts) - 1:
            yield slice(first, i + 1)
            first = i + 1
            size = 0


def number_of(text: str) -> int:
    """A number that a text decides, the same in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest(), "big")
