"""Drawing a token a row from logits that are read once, in Triton.

Chunks of the vocabulary are summed up side by side: their largest logit, their mass, their part of the entropy. Then
chunks race by their masses, and the tokens of the one that won (`sampling.race`), so that no probability is ever
written to memory.

Shapes: N rows, one a masked position; V vocabulary; C chunks of `width` logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dirl_cli.diffusion.sampling import GOLDEN, chunk_width

TILE = 4096  # logits that one program holds in its registers
STEP = tl.constexpr(GOLDEN)


def draw_rows(
    logits: Tensor, seeds: Tensor | None, temperature: float, unsampled_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw a token a row; returns what is known of it, (N,) each, log-probs and entropy in nats.

    These are the token, its log-prob, the likeliest token's log-prob, by how much that one's probability exceeds the
    next one's, and the entropy.
    logits: (N, V), each row contiguous. seeds: (N,) int64; None takes the largest logit, the left one on a tie.
    temperature: 0 counts as 1. unsampled_ids are never drawn and in no probability.
    """
    n, vocabulary = logits.shape
    width = chunk_width(vocabulary)
    chunks = triton.cdiv(vocabulary, width)
    in_tile = max(TILE // width, 1)  # chunks
    allowed = torch.ones(vocabulary, dtype=torch.bool, device=logits.device).index_fill_(0, unsampled_ids, False)
    size = (logits.stride(0), vocabulary, temperature or 1.0)

    # First every chunk of every row by itself, then each row from its chunks' sums.
    peaks, masses, moments = torch.empty(3, n, chunks, device=logits.device)
    sums = (peaks, masses, moments)
    tiles = triton.cdiv(chunks, in_tile)
    _sum_up[(n, tiles)](logits, allowed, *sums, *size, chunks, in_tile=in_tile, width=width, num_warps=8)

    tokens = torch.empty(n, dtype=torch.long, device=logits.device)
    logprobs, likeliest, margins, entropies = torch.empty(4, n, device=logits.device)
    _draw[(n,)](
        logits,
        allowed,
        tokens if seeds is None else seeds,  # greedy drawing does not read it
        *sums,
        tokens,
        logprobs,
        likeliest,
        margins,
        entropies,
        *size,
        chunks,
        greedy=seeds is None,
        width=width,
        lanes=triton.next_power_of_2(chunks),
        num_warps=4,
    )
    return tokens, logprobs, likeliest, margins, entropies


@triton.jit
def _tempered(logits, allowed, row, ids, stride, vocabulary, temperature):
    """Logits of a row at `ids` in fp32, divided by the temperature, -inf where they are not sampled."""
    sampled = tl.load(allowed + ids, mask=ids < vocabulary, other=0) != 0
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=sampled, other=-float("inf"))
    return x.to(tl.float32) / temperature


@triton.jit
def _sum_up(
    logits,
    allowed,
    peaks,
    masses,
    moments,
    stride,
    vocabulary,
    temperature,
    chunks,
    in_tile: tl.constexpr,
    width: tl.constexpr,
):
    """Sums of some chunks of one row: the largest logit m of each, Σ exp(x - m), and Σ exp(x - m) (x - m)."""
    row = tl.program_id(0)
    chunk = tl.program_id(1) * in_tile + tl.arange(0, in_tile)
    ids = chunk[:, None] * width + tl.arange(0, width)[None, :]
    x = _tempered(logits, allowed, row, ids, stride, vocabulary, temperature)  # (in_tile, width)
    peak = tl.max(x, 1)
    below = tl.where(x > -float("inf"), x - peak[:, None], 0)  # a chunk may hold nothing that is sampled
    mass = tl.where(x > -float("inf"), tl.exp(below), 0)
    at = row * chunks + chunk
    inside = chunk < chunks
    tl.store(peaks + at, peak, mask=inside)
    tl.store(masses + at, tl.sum(mass, 1), mask=inside)
    tl.store(moments + at, tl.sum(mass * below, 1), mask=inside)


@triton.jit
def _first(indices, is_match, end: tl.constexpr):
    """The first index that matches."""
    return tl.min(tl.where(is_match, indices, end), 0)


@triton.jit
def _shift(x, bits: tl.constexpr):
    """A logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@triton.jit
def _mix(x):
    """See `sampling._mix`."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


@triton.jit
def draw_seed(key, position, step):
    """See `sampling.draw_seed`."""
    return _mix(_mix(key + position * STEP) + step * STEP)


@triton.jit
def _exponential(seed, number):
    """See `sampling.exponential`."""
    x = _mix(seed + number.to(tl.int64) * STEP)
    return -tl.log((_shift(x, 12).to(tl.float64) + 0.5) * 2.220446049250313e-16)  # 2⁻⁵²


@triton.jit
def _draw(
    logits,
    allowed,
    seeds,
    peaks,
    masses,
    moments,
    tokens,
    logprobs,
    likeliest,
    margins,
    entropies,
    stride,
    vocabulary,
    temperature,
    chunks,
    greedy: tl.constexpr,
    width: tl.constexpr,
    lanes: tl.constexpr,
):
    """Draw one row's token: first its chunk, then the token inside it."""
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
    weight = mass * scale
    total = tl.sum(weight, 0)
    log_total = tl.log(total)

    # The likeliest token is in the first chunk with the largest logit, the next one there or the largest elsewhere.
    place = tl.arange(0, width)
    peak_chunk = _first(lane, peak == highest, lanes)
    in_peak = _tempered(logits, allowed, row, peak_chunk * width + place, stride, vocabulary, temperature)
    others = tl.where(place == _first(place, in_peak == highest, width), -float("inf"), in_peak)
    elsewhere = tl.where(lane == peak_chunk, -float("inf"), peak)
    following = tl.maximum(tl.max(others, 0), tl.max(elsewhere, 0))

    if greedy:
        chunk = peak_chunk
    else:
        seed = tl.load(seeds + row)
        speed = weight / _exponential(seed, width + lane)
        chunk = _first(lane, speed == tl.max(speed, 0), lanes)

    x = _tempered(logits, allowed, row, chunk * width + place, stride, vocabulary, temperature)
    if greedy:
        token = _first(place, x == tl.max(x, 0), width)
    else:
        speed = tl.exp(x - highest) / _exponential(seed, place)
        token = _first(place, speed == tl.max(speed, 0), width)

    drawn = tl.sum(tl.where(place == token, x, 0), 0)  # its logit
    token = tl.minimum(chunk * width + token, vocabulary - 1)  # where a logit is not a number nothing matches
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, drawn - highest - log_total)
    tl.store(likeliest + row, -log_total)
    tl.store(margins + row, (1 - tl.exp(following - highest)) / total)
    mean_below = tl.sum(scale * (moment + mass * below), 0) / total  # E[x] - the largest logit
    tl.store(entropies + row, log_total - mean_below)
