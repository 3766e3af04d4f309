"""Drawing a token a row from logits that are read once, in Triton.

Chunks of the vocabulary are summed up side by side: their largest logit, their mass, their part of the entropy. A row's
token is then looked for in the one chunk that holds it, so that no probability is ever written to memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # logits that one program holds in its registers


def draw_rows(
    logits: Tensor, uniform: Tensor | None, temperature: float, unsampled_ids: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A token a row, its log-prob, the likeliest token's log-prob, and the entropy in nats: (N,) each, the last fp32.

    logits: (N, V), each row contiguous. uniform: (N,) in [0, 1); None takes the largest logit, the left one on a tie.
    temperature: 0 counts as 1. unsampled_ids are never drawn and in no probability.
    """
    n, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, chunk)
    allowed = torch.ones(vocabulary, dtype=torch.bool, device=logits.device).index_fill_(0, unsampled_ids, False)
    sums = torch.empty(3, n, chunks, device=logits.device)
    tokens = torch.empty(n, dtype=torch.long, device=logits.device)
    found = torch.empty(3, n, device=logits.device)
    size = (logits.stride(0), vocabulary, temperature or 1.0)
    _sum_up[(n, chunks)](logits, allowed, *sums, *size, width=chunk, num_warps=8)
    _find[(n,)](
        *(logits, allowed, logits if uniform is None else uniform, *sums, tokens, *found, *size, chunks),
        greedy=uniform is None,
        num_warps=8,
        width=chunk,
        lanes=triton.next_power_of_2(chunks),
    )
    return tokens, *found


@triton.jit
def _tempered(logits, allowed, row, ids, stride, vocabulary, temperature):
    sampled = tl.load(allowed + ids, mask=ids < vocabulary, other=0) != 0
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=sampled, other=-float("inf"))
    return x.to(tl.float32) / temperature


@triton.jit
def _sum_up(logits, allowed, peaks, masses, moments, stride, vocabulary, temperature, width: tl.constexpr):
    """Of one chunk of one row: its largest logit m, Σ exp(x - m), and Σ exp(x - m) (x - m)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    x = _tempered(logits, allowed, row, chunk * width + tl.arange(0, width), stride, vocabulary, temperature)
    peak = tl.max(x, 0)
    below = tl.where(x > -float("inf"), x - peak, 0)  # a chunk may hold nothing that is sampled
    mass = tl.where(x > -float("inf"), tl.exp(below), 0)
    place = row * tl.num_programs(1) + chunk
    tl.store(peaks + place, peak)
    tl.store(masses + place, tl.sum(mass, 0))
    tl.store(moments + place, tl.sum(mass * below, 0))


@triton.jit
def _first(places, chosen, possible, end: tl.constexpr):
    """The first chosen place, or where rounding chose none the last possible one."""
    first = tl.min(tl.where(chosen & possible, places, end), 0)
    return tl.where(first < end, first, tl.max(tl.where(possible, places, 0), 0))


@triton.jit
def _find(
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
    """Of one row: the chunk in which the cumulative mass passes `uniform` of the whole, and the token inside it."""
    row = tl.program_id(0)
    places = tl.arange(0, lanes)
    inside = places < chunks
    peak = tl.load(peaks + row * chunks + places, mask=inside, other=-float("inf"))
    mass = tl.load(masses + row * chunks + places, mask=inside, other=0)
    moment = tl.load(moments + row * chunks + places, mask=inside, other=0)
    highest = tl.max(peak, 0)
    below = tl.where(mass > 0, peak - highest, 0)
    scale = tl.where(mass > 0, tl.exp(below), 0)
    weight = (mass * scale).to(tl.float64)
    total = tl.sum(weight, 0)
    log_total = tl.log(total.to(tl.float32))

    if greedy:
        chunk = _first(places, peak == highest, inside, lanes)
    else:
        target = tl.load(uniform + row).to(tl.float64) * total
        chunk = _first(places, tl.cumsum(weight, 0) > target, weight > 0, lanes)
    ids = tl.arange(0, width)
    x = _tempered(logits, allowed, row, chunk * width + ids, stride, vocabulary, temperature)
    likely = x > -float("inf")
    if greedy:
        token = _first(ids, x == tl.max(x, 0), likely, width)
    else:
        rest = target - tl.sum(tl.where(places < chunk, weight, 0), 0)
        probability = tl.where(likely, tl.exp(x - highest), 0).to(tl.float64)
        token = _first(ids, tl.cumsum(probability, 0) > rest, probability > 0, width)

    drawn = tl.sum(tl.where(ids == token, x, 0), 0)
    tl.store(tokens + row, (chunk * width + token).to(tl.int64))
    tl.store(logprobs + row, drawn - highest - log_total)
    tl.store(likeliest + row, -log_total)
    spread = tl.sum(scale * (moment + mass * below), 0) / total.to(tl.float32)
    tl.store(entropies + row, log_total - spread)
