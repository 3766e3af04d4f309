"""The specification, as code, of a text's likelihood: one forward of the plain sequence for each state.

Every state is written out as the tokens that a sampler would see at that moment: all before the block, and the block
with masks where nothing is revealed yet.
"""

from collections.abc import Sequence
from itertools import combinations, permutations
from math import comb, factorial, log

import torch
from torch import Tensor

from dirl_cli.models.load import DiffusionLM


def block_logprobs(lm: DiffusionLM, token_ids: Sequence[int], start: int, masked: set[int]) -> Tensor:
    """(B, V) log-probs in the block from `start` on, in which `masked` positions and all behind the text are masks."""
    block = []
    for position in range(start, start + lm.block_size):
        is_there = position < len(token_ids) and position not in masked
        block.append(token_ids[position] if is_there else lm.mask_token_id)
    state = torch.tensor([[*token_ids[:start], *block]])
    number = torch.arange(state.shape[1]) // lm.block_size
    seen = number[:, None] >= number[None, :]
    with torch.no_grad():
        logits = lm.model(input_ids=state, attention_mask=seen[None, None]).logits[0, start:].float()
    logits[:, list(lm.unsampled_ids)] = -torch.inf
    return logits.log_softmax(-1)


def runs(scored: Sequence[bool], block_size: int) -> list[list[int]]:
    """The scored positions that follow each other in a block."""
    found: list[list[int]] = []
    for position, is_scored in enumerate(scored):
        if not is_scored:
            continue
        if position % block_size and position and scored[position - 1]:
            found[-1].append(position)
        else:
            found.append([position])
    return found


def later(run: Sequence[int], block_size: int) -> set[int]:
    """The positions behind a run in its block."""
    return set(range(run[-1] + 1, (run[-1] // block_size + 1) * block_size))


def revealed_in(lm: DiffusionLM, token_ids: Sequence[int], run: Sequence[int], order: Sequence[int]) -> float:
    """The log-prob of a run's tokens, revealed one by one in this order of its positions."""
    start = run[0] // lm.block_size * lm.block_size
    total = 0.0
    masked = set(run) | later(run, lm.block_size)
    for position in order:
        logprobs = block_logprobs(lm, token_ids, start, masked)
        total += float(logprobs[position - start, token_ids[position]])
        masked.remove(position)
    return total


def left_to_right(lm: DiffusionLM, token_ids: Sequence[int], scored: Sequence[bool]) -> float:
    """The log-probability of the scored tokens, one after another."""
    return sum(revealed_in(lm, token_ids, run, run) for run in runs(scored, lm.block_size))


def any_order(lm: DiffusionLM, token_ids: Sequence[int], scored: Sequence[bool]) -> float:
    """The log of the mean probability over all orders in which each run may be revealed."""
    total = 0.0
    for run in runs(scored, lm.block_size):
        ways = [revealed_in(lm, token_ids, run, order) for order in permutations(run)]
        total += float(torch.tensor(ways, dtype=torch.float64).logsumexp(0)) - log(factorial(len(run)))
    return total


def elbo(lm: DiffusionLM, token_ids: Sequence[int], scored: Sequence[bool]) -> float:
    """Σ over runs of the mean over k of n/k Σ_{i masked} log p(x_i), exactly: over every set of k tokens."""
    total = 0.0
    for run in runs(scored, lm.block_size):
        start = run[0] // lm.block_size * lm.block_size
        n = len(run)
        for k in range(1, n + 1):
            for subset in combinations(run, k):
                logprobs = block_logprobs(lm, token_ids, start, set(subset) | later(run, lm.block_size))
                total += sum(float(logprobs[i - start, token_ids[i]]) for i in subset) / k / comb(n, k)
    return total
