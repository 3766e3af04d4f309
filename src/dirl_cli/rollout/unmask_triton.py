"""What an unmasker does before and after drawing, in Triton: one kernel each, where plain operations are a hundred.

Shapes: S slots, N blocks of B tokens, M masked tokens or more, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dirl_cli.diffusion.kernels import draw_seed
from dirl_cli.diffusion.sampling import Candidates
from dirl_cli.rollout.sequences import MASKED, SequenceState
from dirl_cli.types import Decoding

TILE = 1024  # tokens that `select_masked` looks at in a step
SEQUENTIAL, STATIC, DYNAMIC, MARGIN, ADAPTIVE, BOUNDED = (tl.constexpr(number) for number in range(6))
STRATEGIES = {
    "sequential": SEQUENTIAL,
    "low_confidence_static": STATIC,
    "low_confidence_dynamic": DYNAMIC,
    "probability_margin": MARGIN,
    "bounded_adaptive": ADAPTIVE,
    "entropy_bounded": BOUNDED,
}


def select_masked(sequences: SequenceState, blocks: Tensor, size: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The masked tokens of N blocks of `size` tokens.

    blocks: see `sequences.Unmasker`. count: M. Returns their index in all N * B tokens, 0 where there are fewer than M;
    the seeds of their draws, (M,) each; and of each block how many there are in the blocks before it, (N,).
    """
    rows = torch.empty(count, dtype=torch.long, device=blocks.device)
    seeds = torch.empty_like(rows)
    first = torch.empty_like(blocks[0])
    _select_masked[1,](
        sequences.revealed_at,
        blocks,
        rows,
        seeds,
        first,
        blocks.shape[1],
        *blocks.stride(),
        sequences.length,
        count,
        size=size,
        tile=TILE,
        masked_is=MASKED,
        num_warps=8,
    )
    return rows, seeds, first


def reveal_drawn(
    sequences: SequenceState,
    blocks: Tensor,
    size: int,
    first: Tensor,
    drawn: Candidates,
    decoding: Decoding,
    thresholds: Tensor,
) -> Tensor:
    """Reveal in `sequences` what a built-in strategy chooses; see `sequences.Unmasker`, also for what it returns.

    first: from `select_masked`. drawn: of the M masked tokens. thresholds: see `unmasking.threshold_table`.
    """
    n = blocks.shape[1]
    tokens = torch.empty(n, size, dtype=torch.long, device=blocks.device)
    strategy = STRATEGIES[decoding.strategy]
    scores = drawn.confidence
    if strategy is BOUNDED:
        scores = drawn.entropy
    elif strategy is MARGIN:
        scores = drawn.margin
    steps = decoding.denoising_steps or size
    record_entropy = sequences.entropies is not None
    _reveal_drawn[n,](
        sequences.tokens,
        sequences.revealed_at,
        sequences.logprobs,
        sequences.confidences,
        sequences.entropies if record_entropy else sequences.logprobs,
        blocks,
        first,
        drawn.tokens,
        drawn.logprobs,
        drawn.confidence,
        drawn.entropy if record_entropy else drawn.logprobs,
        scores,
        thresholds,
        tokens,
        *blocks.stride(),
        sequences.length,
        size // steps,
        size % steps,
        len(thresholds),
        float(decoding.threshold),
        float(decoding.lowest_threshold),
        size=size,
        width=triton.next_power_of_2(size),
        strategy=strategy,
        masked_is=MASKED,
        record_entropy=record_entropy,
        num_warps=4 if size > 16 else 1,
    )
    return tokens


@triton.jit
def _select_masked(  # type: ignore[no-untyped-def]
    revealed_at,
    blocks,
    rows,
    seeds,
    first,
    n,
    to_next_field,
    to_next_block,
    length,
    count,
    size: tl.constexpr,
    tile: tl.constexpr,
    masked_is: tl.constexpr,
):
    """Look at all tokens in order, a tile at a time, and give the masked ones their places."""
    masked_before = 0
    for start in range(0, n * size, tile):
        row = start + tl.arange(0, tile)
        inside = row < n * size
        block = row // size
        fields = blocks + block * to_next_block
        slot = tl.load(fields, inside, 0)
        position = tl.load(fields + to_next_field, inside, 0) + row % size
        step = tl.load(fields + 2 * to_next_field, inside, 0)
        key = tl.load(fields + 3 * to_next_field, inside, 0)
        is_masked = inside & (tl.load(revealed_at + slot * length + position, inside, masked_is - 1) == masked_is)

        counted = is_masked.to(tl.int32)
        before = masked_before + tl.cumsum(counted, 0) - counted
        fits = is_masked & (before < count)
        seed = draw_seed(key, position, step)
        tl.store(rows + before, row.to(tl.int64), fits)
        tl.store(seeds + before, seed, fits)
        tl.store(first + block, before.to(tl.int64), inside & (row % size == 0))
        masked_before += tl.sum(counted, 0)

    for start in range(0, count, tile):
        place = start + tl.arange(0, tile)
        beyond = (place >= masked_before) & (place < count)
        tl.store(rows + place, tl.zeros([tile], tl.int64), beyond)
        tl.store(seeds + place, tl.zeros([tile], tl.int64), beyond)


@triton.jit
def _reveal_drawn(  # type: ignore[no-untyped-def]
    tokens,
    revealed_at,
    logprobs,
    confidences,
    entropies,
    blocks,
    first,
    drawn,
    drawn_logprobs,
    drawn_confidences,
    drawn_entropies,
    scores,
    thresholds,
    blocks_after,
    to_next_field,
    to_next_block,
    length,
    owed_always,
    steps_with_more,
    steps,
    threshold,
    lowest_threshold,
    size: tl.constexpr,
    width: tl.constexpr,
    strategy: tl.constexpr,
    masked_is: tl.constexpr,
    record_entropy: tl.constexpr,
):
    """One block. scores: of the candidates, entropies for BOUNDED, margins for MARGIN, else confidences.

    entropies, drawn_entropies: neither read nor written but with record_entropy.
    """
    block = tl.program_id(0)
    fields = blocks + block * to_next_block
    slot = tl.load(fields)
    start = tl.load(fields + to_next_field)
    step = tl.load(fields + 2 * to_next_field)

    place = tl.arange(0, width)
    inside = place < size
    at = slot * length + start + place
    when = tl.load(revealed_at + at, inside, masked_is - 1)
    is_masked = inside & (when == masked_is)
    nth = tl.cumsum(is_masked.to(tl.int32), 0)  # from 1
    candidate = tl.load(first + block) + nth - 1
    owed = tl.maximum(owed_always + (step <= steps_with_more).to(tl.int64), 1)

    if strategy == SEQUENTIAL:
        is_revealed = is_masked & (nth <= owed)
    else:
        # By descending confidence or ascending entropy, the left one first on a tie: who comes before whom.
        score = tl.load(scores + candidate, is_masked, 0.0)
        order = -score if strategy == BOUNDED else score
        is_larger = order[None, :] > order[:, None]
        is_equal = order[None, :] == order[:, None]
        is_left = place[None, :] < place[:, None]
        is_before = is_masked[None, :] & (is_larger | (is_equal & is_left))  # (i, j): j before i
        rank = tl.sum(is_before.to(tl.int32), 1)
        if strategy == STATIC:
            is_revealed = is_masked & (rank < owed)
        elif strategy == DYNAMIC or strategy == MARGIN:  # noqa: SIM109, since Triton has no tuples to look into
            at_step = tl.maximum(tl.minimum(step, steps), 1) - 1  # of a block that only fills a graph it may be 0
            own = tl.load(thresholds + at_step * size + place, inside, 0.0)
            is_sure = is_masked & (score > own)
            is_enough = tl.sum(is_sure.to(tl.int32), 0) >= owed
            is_revealed = tl.where(is_enough, is_sure, is_masked & (rank < owed))
        elif strategy == ADAPTIVE:
            was_revealed = inside & (when > masked_is)
            count = tl.sum(was_revealed.to(tl.int32), 0)
            earlier = tl.load(confidences + at, was_revealed, 0.0).to(tl.float64)
            mean = (tl.sum(earlier, 0) / tl.maximum(count, 1)).to(tl.float32)
            surest = tl.max(tl.where(is_masked, score, 0.0), 0)
            own = tl.minimum(tl.maximum(tl.where(count > 0, mean, surest), lowest_threshold), threshold)
            is_sure = is_masked & (score >= own)
            is_any = tl.sum(is_sure.to(tl.int32), 0) > 0
            is_revealed = tl.where(is_any, is_sure, is_masked & (rank == 0))
        else:
            is_summed = is_before | (place[None, :] == place[:, None])
            summed = tl.sum(tl.where(is_summed, score[None, :], 0.0), 1)
            is_revealed = is_masked & ((summed <= threshold) | (rank == 0))

    token = tl.where(is_revealed, tl.load(drawn + candidate, is_revealed, 0), tl.load(tokens + at, inside, 0))
    tl.store(tokens + at, token, is_revealed)
    tl.store(revealed_at + at, step + tl.zeros([width], tl.int64), is_revealed)
    tl.store(logprobs + at, tl.load(drawn_logprobs + candidate, is_revealed, 0.0), is_revealed)
    tl.store(confidences + at, tl.load(drawn_confidences + candidate, is_revealed, 0.0), is_revealed)
    if record_entropy:
        tl.store(entropies + at, tl.load(drawn_entropies + candidate, is_revealed, 0.0), is_revealed)
    tl.store(blocks_after + block * size + place, tl.where(is_masked & ~is_revealed, -1, token), inside)
