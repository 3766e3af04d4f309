"""From logits to distributions, candidates and confidences.

Shapes: N masked positions, V vocabulary.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
    computed_entropy: of that distribution in nats, (N,), where drawing computed it anyway.
    """

    tokens: Tensor
    logprobs: Tensor
    confidence: Tensor
    log_distribution: Callable[[], Tensor]
    computed_entropy: Tensor | None = None

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


def draw_candidates(
    logits: Tensor,
    uniform: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    confidence: str,
    unsampled_ids: Tensor,
) -> Candidates:
    """Draw one candidate a position; its confidence is taken after temperature and before top-k and top-p.

    logits: (N, V). uniform: (N,) in [0, 1), the only randomness, which temperature 0 does without. confidence:
    sampled, max, or entropy, the latter as exp(-entropy), which like the others lies in (0, 1].

    A token is where the cumulative distribution passes its position's one number, so that a CPU and a GPU draw the
    same but for rounding; the largest of logits with Gumbel noise would take V numbers of one generator on both.
    """
    is_greedy = uniform is None or temperature == 0

    # The kernel reads the logits once; truncation has to sort them.
    if logits.is_cuda and (is_greedy or (top_k == 0 and top_p == 1)):
        return draw_fused(logits, None if is_greedy else uniform, temperature, confidence, unsampled_ids)

    logprobs = temper(logits, temperature, unsampled_ids).log_softmax(-1)
    if uniform is None or temperature == 0:
        return make_candidates(logprobs, logprobs, logprobs.argmax(-1), confidence)
    truncated_logprobs = truncated(logprobs, top_k, top_p)
    return make_candidates(logprobs, truncated_logprobs, invert(truncated_logprobs.exp(), uniform), confidence)


def draw_fused(
    logits: Tensor, uniform: Tensor | None, temperature: float, confidence: str, unsampled_ids: Tensor
) -> Candidates:
    """`draw_candidates` without truncation, in one pass over the logits; uniform: None takes the likeliest token."""
    from dirl_cli.diffusion.kernels import draw_rows  # Triton, which torch brings along for CUDA

    tokens, logprobs, likeliest, entropies = draw_rows(logits, uniform, temperature, unsampled_ids)
    log_confidence = {"sampled": logprobs, "max": likeliest, "entropy": -entropies}[confidence]

    def log_distribution() -> Tensor:
        return temper(logits, temperature, unsampled_ids).log_softmax(-1)

    return Candidates(tokens, logprobs, log_confidence.exp(), log_distribution, entropies)


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


def invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token (N,) at which the cumulative distribution passes `uniform`. probabilities: (N, V); uniform: (N,)."""
    # In fp64: rounding in a long fp32 sum would decide which token is passed.
    cumulative = probabilities.to(torch.float64, copy=True).cumsum_(-1)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))  # a product that rounds up would find no token
    target = torch.minimum(uniform[:, None] * total, below_total)
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def request_key(seed: int, prompt_ids: list[int], sample: int) -> int:
    """A 63-bit key for the `sample`-th answer to a prompt: all that its randomness depends on."""
    text = f"{seed}:{sample}:{','.join(map(str, prompt_ids))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def uniform(key: Tensor, position: Tensor, step: Tensor) -> Tensor:
    """Numbers in [0, 1) that depend on nothing but their arguments, so that a batch cannot change an answer.

    key, position, step: int64, broadcastable. Mixing as in SplitMix64 (Steele et al., OOPSLA 2014).
    """
    mixed = _mix(_mix(key + position * -7046029254386353131) + step * -7046029254386353131)
    return _shift(mixed, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64; its constants are written as the int64 of the same bits."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift, which int64 lacks."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
