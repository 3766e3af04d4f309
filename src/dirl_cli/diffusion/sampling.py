"""From logits to distributions, candidates and confidences.

Shapes: N masked positions, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # SplitMix64's step from number to number, as the int64 of the same bits


def temper(logits: Tensor, temperature: float, unsampled_ids: Tensor) -> Tensor:
    """Logits in fp32 at `temperature` (0 counts as 1), without the ids that are never sampled. logits: (N, V)."""
    tempered = logits.to(torch.float32, copy=True)
    return tempered.div_(temperature or 1.0).index_fill_(-1, unsampled_ids, -torch.inf)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the `top_k` largest logits (0: all), then the fewest of those whose probabilities reach `top_p`.

    logits: (N, V). Returns (N, V), -inf where left out.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    # Of what top-k left, a token stays if those before it in order of probability do not reach top_p yet.
    if top_p < 1:
        ordered, ids = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the first is always kept
        is_left_out = torch.empty_like(beyond).scatter_(-1, ids, beyond)  # from the sorted order back to that of ids
        logits = logits.masked_fill(is_left_out, -torch.inf)
    return logits


def entropy(logprobs: Tensor) -> Tensor:
    """Entropy in nats of normalised log-probabilities, -inf allowed: (…, V) to (…)."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


@dataclass(frozen=True)
class Candidates:
    """A token drawn for each of N positions.

    tokens, logprobs (of the distribution they were drawn from), confidence (in (0, 1]): (N,).
    log_distribution: computes all log-probs before truncation, (N, V), for the few strategies that ask for them.
    computed_entropy, computed_margin: see `entropy` and `margin`, (N,), where drawing computed them anyway.
    """

    tokens: Tensor
    logprobs: Tensor
    confidence: Tensor
    log_distribution: Callable[[], Tensor]
    computed_entropy: Tensor | None = None
    computed_margin: Tensor | None = None

    @cached_property
    def distribution(self) -> Tensor:
        """All log-probs before truncation, (N, V): computed when first asked for, since they are large."""
        return self.log_distribution()

    @cached_property
    def entropy(self) -> Tensor:
        """Entropy of the distribution before truncation, in nats: (N,)."""
        if self.computed_entropy is not None:
            return self.computed_entropy
        return entropy(self.distribution)

    @cached_property
    def margin(self) -> Tensor:
        """By how much the likeliest token's probability before truncation exceeds the next one's: (N,)."""
        if self.computed_margin is not None:
            return self.computed_margin
        first, second = self.distribution.topk(2).values.exp().unbind(-1)
        return first - second


def draw_candidates(
    logits: Tensor,
    seeds: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    confidence: str,
    unsampled_ids: Tensor,
) -> Candidates:
    """Draw one candidate a position; its confidence is taken after temperature and before top-k and top-p.

    logits: (N, V). seeds: (N,) from `draw_seed`, the only randomness, which temperature 0 does without. confidence:
    sampled, max, or entropy, the latter as exp(-entropy), which like the others lies in (0, 1].
    """
    is_greedy = seeds is None or temperature == 0

    # The kernel reads the logits once; truncation has to sort them.
    if logits.is_cuda and (is_greedy or (top_k == 0 and top_p == 1)):
        return draw_fused(logits, None if is_greedy else seeds, temperature, confidence, unsampled_ids)

    logprobs = temper(logits, temperature, unsampled_ids).log_softmax(-1)
    if seeds is None or temperature == 0:
        return make_candidates(logprobs, logprobs, logprobs.argmax(-1), confidence)
    truncated_logprobs = truncated(logprobs, top_k, top_p)
    return make_candidates(logprobs, truncated_logprobs, race(truncated_logprobs, seeds), confidence)


def draw_fused(
    logits: Tensor, seeds: Tensor | None, temperature: float, confidence: str, unsampled_ids: Tensor
) -> Candidates:
    """`draw_candidates` without truncation, in one pass over the logits; seeds: None takes the likeliest token."""
    from dirl_cli.diffusion.kernels import draw_rows  # Triton, which torch brings along for CUDA

    tokens, logprobs, likeliest, margins, entropies = draw_rows(logits, seeds, temperature, unsampled_ids)
    log_confidence = {"sampled": logprobs, "max": likeliest, "entropy": -entropies}[confidence]

    def log_distribution() -> Tensor:
        return temper(logits, temperature, unsampled_ids).log_softmax(-1)

    return Candidates(tokens, logprobs, log_confidence.exp(), log_distribution, entropies, margins)


def truncated(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probs (N, V) cut by top-k and top-p and normalised again; as they are where these are off."""
    if top_k or top_p < 1:
        return truncate(logprobs, top_k, top_p).log_softmax(-1)
    return logprobs


def make_candidates(logprobs: Tensor, truncated_logprobs: Tensor, tokens: Tensor, confidence: str) -> Candidates:
    """Candidates of drawn tokens (N,), with their confidence.

    logprobs, truncated_logprobs: (N, V), before and after truncation. confidence: see `draw_candidates`.
    """
    ids = tokens[:, None]
    if confidence == "sampled":
        certainty = logprobs.gather(-1, ids).squeeze(-1).exp()
    elif confidence == "max":
        certainty = logprobs.amax(-1).exp()
    else:
        certainty = (-entropy(logprobs)).exp()
    return Candidates(tokens, truncated_logprobs.gather(-1, ids).squeeze(-1), certainty, lambda: logprobs)


def race(logprobs: Tensor, seeds: Tensor) -> Tensor:
    """A token of each row, drawn by its probability: the winner of a race. logprobs: (N, V). seeds: (N,).

    Each would arrive after an exponential time ÷ its probability, and the first is drawn, as by the largest logit with
    Gumbel noise. Logits that another batch rounds otherwise change the winner of a close race only, where the sum of
    the probabilities before a token moves with the rounding of all (benchmarks/draws.py).

    Not V times are drawn a row, but about 2 √V: first chunks of the vocabulary race, by what their tokens'
    probabilities sum up to, then the tokens of the chunk that won.
    """
    n, vocabulary = logprobs.shape
    width = chunk_width(vocabulary)
    chunks = -(-vocabulary // width)
    probabilities = logprobs.new_empty(n, chunks * width)
    torch.exp(logprobs, out=probabilities[:, :vocabulary])
    probabilities[:, vocabulary:] = 0
    probabilities = probabilities.unflatten(1, (chunks, width))

    # A seed's first numbers are those of a chunk's tokens, and then comes one for each chunk.
    times = exponential(seeds[:, None], torch.arange(width + chunks, device=seeds.device))
    winner = (probabilities.sum(-1) / times[:, width:]).argmax(-1)
    in_winner = probabilities.gather(1, winner[:, None, None].expand(-1, 1, width)).squeeze(1)
    return winner * width + (in_winner / times[:, :width]).argmax(-1)


def chunk_width(vocabulary: int) -> int:
    """The tokens of a chunk, on every device: the power of two at √V or below, with which a race needs few numbers."""
    return 1 << (math.isqrt(vocabulary).bit_length() - 1)


def request_key(seed: int, prompt_ids: list[int], sample: int) -> int:
    """A 63-bit key for the `sample`-th answer to a prompt: all that its randomness depends on."""
    text = f"{seed}:{sample}:{','.join(map(str, prompt_ids))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def draw_seed(key: Tensor, position: Tensor, step: Tensor) -> Tensor:
    """The seed of one draw: it depends on nothing but its arguments, so that a batch cannot change an answer.

    key: `request_key`. All int64, broadcastable.
    """
    return _mix(_mix(key + position * GOLDEN) + step * GOLDEN)


def exponential(seed: Tensor, number: Tensor) -> Tensor:
    """The `number`-th of a seed's numbers of exponential distribution and mean 1, in fp64; int64, broadcastable.

    Their bits are those of SplitMix64 (Steele et al., OOPSLA 2014), the same on every device.
    """
    bits = _shift(_mix(seed + number * GOLDEN), 12)
    middle = bits.double().add_(0.5).mul_(2.0**-52)  # of 52 bits, so that neither end of (0, 1) is reached
    return middle.log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64; its constants are written as the int64 of the same bits."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift, which int64 lacks."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
