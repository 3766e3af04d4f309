"""The specification, as code, of sampling: one sequence, the whole of it through the model for every step.

No cache, no batch, no stop tokens. The engines must write the same answers, faster. B is the block size, V the
vocabulary.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dirl_cli.diffusion.layout import Coordinates
from dirl_cli.diffusion.sampling import make_candidates, request_key, temper
from dirl_cli.diffusion.unmasking import State, find_strategy, quota, reveal, spread
from dirl_cli.models.attention import dense_mask
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.low_precision import inference_model
from dirl_cli.types import Decoding, Trajectory


@torch.inference_mode()
def last_block_logits(lm: DiffusionLM, token_ids: list[int]) -> Tensor:
    """Logits of the last block of whole blocks, all of them gone through the model at once: (B, V)."""
    position = torch.arange(len(token_ids), device=lm.device)[None]
    zeros = torch.zeros_like(position)
    mask = dense_mask(Coordinates(zeros, zeros, position // lm.block_size, zeros))
    model = inference_model(lm.model, "sdpa")
    output = model(torch.tensor([token_ids], device=lm.device), position_ids=position, attention_mask=mask)
    return output.logits[0, -lm.block_size :]


def greedy_answer(lm: DiffusionLM, prompt_ids: list[int], decoding: Decoding) -> Trajectory:
    """The most likely tokens, revealed in the order of the decoding strategy."""
    size, start = lm.block_size, len(prompt_ids)
    unsampled = torch.tensor(lm.unsampled_ids, device=lm.device)
    sequence = list(prompt_ids)
    reveal_step: list[int] = []
    logprobs: list[float] = []
    forwards = 0

    while len(sequence) < start + decoding.max_new_tokens:
        # The first block may begin with the end of the prompt.
        block_start = len(sequence) // size * size
        block_begins_with = sequence[block_start:]
        masks = [lm.mask_token_id] * (size - len(block_begins_with))
        block = torch.tensor([*block_begins_with, *masks], device=lm.device)
        masked = block == lm.mask_token_id
        steps = torch.zeros(size, dtype=torch.long)
        block_logprobs = torch.zeros(size, device=lm.device)
        earlier = torch.full((1, size), -1.0, device=lm.device)

        step = 0
        while masked.any():
            step += 1
            forwards += 1
            logits = last_block_logits(lm, sequence[:block_start] + block.tolist())[masked]
            full = temper(logits, 0.0, unsampled).log_softmax(-1)
            drawn = make_candidates(full, full, full.argmax(-1), decoding.confidence)
            owed = quota(torch.tensor([step], device=lm.device), size, decoding.denoising_steps)
            at = torch.tensor([block_start], device=lm.device)
            threshold = decoding.threshold
            if decoding.is_threshold_scheduled:
                threshold = scheduled(decoding, step, size).to(lm.device)
            state = State(masked[None], drawn, owed, threshold, at, decoding.lowest_threshold, earlier)
            revealed = reveal(find_strategy(decoding.strategy), state)[0]
            earlier = torch.where(revealed, state.confidence, earlier)

            block = torch.where(revealed, spread(drawn.tokens, masked), block)
            block_logprobs = torch.where(revealed, spread(drawn.logprobs, masked), block_logprobs)
            steps[revealed.cpu()] = step
            masked = masked & ~revealed

        sequence += block.tolist()[len(block_begins_with) :]
        reveal_step += steps.tolist()[len(block_begins_with) :]
        logprobs += block_logprobs.tolist()[len(block_begins_with) :]

    return Trajectory(prompt_ids, sequence[start:], reveal_step, logprobs, "length", forwards, forwards)


def scheduled(decoding: Decoding, step: int, size: int) -> Tensor:
    """The threshold at a step for each token of a block: (B,)."""
    last = (decoding.denoising_steps or size) - 1
    thresholds = []
    for place in range(size):
        threshold = decoding.threshold
        threshold += decoding.threshold_by_step * (min(step - 1, last) / last if last else 0)
        threshold += decoding.threshold_by_position * (place / (size - 1) if size > 1 else 0)
        thresholds.append(threshold)
    return torch.tensor(thresholds)


def sequential_answer(
    lm: DiffusionLM, prompt_ids: list[int], decoding: Decoding, hint: Mapping[int, int] | None = None
) -> tuple[list[int], list[int]]:
    """Tokens drawn one by one, from left to right, with the sampler's own random numbers, and their reveal steps.

    hint: tokens that stand in the answer from the start, by their index in it; their step is 0.
    """
    start, size = len(prompt_ids), lm.block_size
    end = -(-(start + decoding.max_new_tokens) // size) * size
    key = request_key(decoding.seed, prompt_ids, 0)
    sequence = [*prompt_ids, *[lm.mask_token_id] * (end - start)]
    for index, token in (hint or {}).items():
        sequence[start + index] = token
    reveal_step = [0] * (end - start)

    for block_start in range(start // size * size, end, size):
        step = 0
        for position in range(max(block_start, start), block_start + size):
            if position - start in (hint or {}):
                continue
            step += 1
            logits = last_block_logits(lm, sequence[: block_start + size])[position - block_start].double()
            logits[list(lm.unsampled_ids)] = -torch.inf
            logprobs = (logits / decoding.temperature).log_softmax(-1)
            sequence[position] = draw(logprobs.tolist(), mixed(mixed(key + position * GOLDEN) + step * GOLDEN))
            reveal_step[position - start] = step

    return sequence[start:], reveal_step


GOLDEN = 0x9E3779B97F4A7C15


def mixed(x: int) -> int:
    """SplitMix64's mixing of 64 bits (Steele et al., OOPSLA 2014)."""
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def draw(logprobs: Sequence[float], seed: int) -> int:
    """A token by its probability: of exponential times ÷ probabilities the first, for chunks, then in the chunk.

    A chunk has 2^k tokens, 2^k the power of two at √V or below, and the probability of all its tokens. seed: its first
    numbers are the tokens' of whichever chunk, then come the chunks'.
    """

    def time(number: int) -> float:
        return -math.log(((mixed(seed + number * GOLDEN) >> 12) + 0.5) / 2**52)

    probabilities = [math.exp(logprob) for logprob in logprobs]
    width = 1
    while (2 * width) ** 2 <= len(probabilities):
        width *= 2
    starts = range(0, len(probabilities), width)
    arrivals = {}
    for chunk, start in enumerate(starts):
        mass = sum(probabilities[start : start + width])
        arrivals[start] = time(width + chunk) / mass if mass else math.inf
    first = min(arrivals, key=arrivals.__getitem__)
    in_chunk = {}
    for place, probability in enumerate(probabilities[first : first + width]):
        in_chunk[first + place] = time(place) / probability if probability else math.inf
    return min(in_chunk, key=in_chunk.__getitem__)
