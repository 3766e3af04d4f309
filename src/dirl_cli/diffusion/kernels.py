"""Drawing a token a row from logits that are read once, in Triton.

Chunks of the vocabulary are summed up side by side: their largest logit, their mass, their part of the entropy. A row's
token is then looked for in the one chunk that holds it, so that no probability is ever written to memory.

Shapes: N rows, one a masked position; V vocabulary; C chunks of `width` logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # logits that one program holds in its registers


def draw_rows(
    logits: Tensor, uniform: Tensor | None, temperature: float, unsampled_ids: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a token a row; returns it, its log-prob, the likeliest token's log-prob and the entropy, all (N,), in nats.

    logits: (N, V), each row contiguous. uniform: (N,) in [0, 1); None takes the largest logit, the left one on a tie.
    temperature: 0 counts as 1. unsampled_ids are never drawn and in no probability.
    """
    n, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, chunk)
    allowed = torch.ones(vocabulary, dtype=torch.bool, device=logits.device).index_fill_(0, unsampled_ids, False)
    size = (logits.stride(0), vocabulary, temperature or 1.0)

    # First every chunk of every row by itself, then each row from its chunks' sums.
    peaks, masses, moments = torch.empty(3, n, chunks, device=logits.device)
    _sum_up[(n, chunks)](logits, allowed, peaks, masses, moments, *size, width=chunk, num_warps=8)

    tokens = torch.empty(n, dtype=torch.long, device=logits.device)
    logprobs, likeliest, entropies = torch.empty(3, n, device=logits.device)
    _draw[(n,)](
        logits,
        allowed,
        logits if uniform is None else uniform,  # greedy drawing does not read it
        peaks,
        masses,
        moments,
        tokens,
        logprobs,
        likeliest,
        entropies,
        *size,
        chunks,
        greedy=uniform is None,
        num_warps=8,
        width=chunk,
        lanes=triton.next_power_of_2(chunks),
    )
    return tokens, logprobs, likeliest, entropies


@triton.jit
def _tempered(logits, allowed, row, ids, stride, vocabulary, temperature):
    """Logits of a row at `ids` in fp32, divided by the temperature, -inf where they are not sampled."""
    sampled = tl.load(allowed + ids, mask=ids < vocabulary, other=0) != 0
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=sampled, other=-float("inf"))
    return x.to(tl.float32) / temperature


@triton.jit
def _sum_up(logits, allowed, peaks, masses, moments, stride, vocabulary, temperature, width: tl.constexpr):
    """Sums of one chunk of one row: its largest logit m, Σ exp(x - m), and Σ exp(x - m) (x - m)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    x = _tempered(logits, allowed, row, chunk * width + tl.arange(0, width), stride, vocabulary, temperature)
    peak = tl.max(x, 0)
    below = tl.where(x > -float("inf"), x - peak, 0)  # a chunk may hold nothing that is sampled
    mass = tl.where(x > -float("inf"), tl.exp(below), 0)
    at = row * tl.num_programs(1) + chunk
    tl.store(peaks + at, peak)
    tl.store(masses + at, tl.sum(mass, 0))
    tl.store(moments + at, tl.sum(mass * below, 0))


@triton.jit
def _first(indices, is_match, is_possible, end: tl.constexpr):
    """The first index that matches, or where rounding lets none match the last possible one."""
    first = tl.min(tl.where(is_match & is_possible, indices, end), 0)
    return tl.where(first < end, first, tl.max(tl.where(is_possible, indices, 0), 0))


@triton.jit
def _draw(
    logits,
    allowed,
    uniform,
    peaks,
    masses,
    moments,
    tokens,
    logprobs,
    likeliest,
    entropies,
    stride,
    vocabulary,
    temperature,
    chunks,
    greedy: tl.constexpr,
    width: tl.constexpr,
    lanes: tl.constexpr,
):
    """Draw one row's token: first the chunk in which the cumulative mass passes `uniform`, then the token inside it."""
    row = tl.program_id(0)

    # The chunks' sums, brought from each chunk's largest logit to the row's.
    lane = tl.arange(0, lanes)  # a chunk each
    inside = lane < chunks
    peak = tl.load(peaks + row * chunks + lane, mask=inside, other=-float("inf"))
    mass = tl.load(masses + row * chunks + lane, mask=inside, other=0)
    moment = tl.load(moments + row * chunks + lane, mask=inside, other=0)
    highest = tl.max(peak, 0)
    below = tl.where(mass > 0, peak - highest, 0)
    scale = tl.where(mass > 0, tl.exp(below), 0)
    weight = (mass * scale).to(tl.float64)
    total = tl.sum(weight, 0)
    log_total = tl.log(total.to(tl.float32))

    if greedy:
        chunk = _first(lane, peak == highest, inside, lanes)
    else:
        target = tl.load(uniform + row).to(tl.float64) * total
        chunk = _first(lane, tl.cumsum(weight, 0) > target, weight > 0, lanes)

    ids = tl.arange(0, width)
    x = _tempered(logits, allowed, row, chunk * width + ids, stride, vocabulary, temperature)
    likely = x > -float("inf")
    if greedy:
        token = _first(ids, x == tl.max(x, 0), likely, width)
    else:
        target_in_chunk = target - tl.sum(tl.where(lane < chunk, weight, 0), 0)
        probability = tl.where(likely, tl.exp(x - highest), 0).to(tl.float64)
        token = _first(ids, tl.cumsum(probability, 0) > target_in_chunk, probability > 0, width)

    drawn = tl.sum(tl.where(ids == token, x, 0), 0)
    tl.store(tokens + row, (chunk * width + token).to(tl.int64))
    tl.store(logprobs + row, drawn - highest - log_total)
    tl.store(likeliest + row, -log_total)
    mean_below = tl.sum(scale * (moment + mass * below), 0) / total.to(tl.float32)  # E[x] - the largest logit
    tl.store(entropies + row, log_total - mean_below)
