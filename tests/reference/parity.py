"""A slow loop that every engine is compared with, and what it was that two engines decided differently."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dirl_cli.diffusion.layout import Coordinates
from dirl_cli.diffusion.sampling import candidates, temper
from dirl_cli.diffusion.unmasking import State, find_strategy, quota, reveal, spread
from dirl_cli.models.attention import dense_mask
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.low_precision import inference_model
from dirl_cli.types import Decoding, Trajectory


@torch.inference_mode()
def last_block(lm: DiffusionLM, token_ids: list[int]) -> Tensor:
    """Logits of the last block of whole blocks, all of them gone through the model at once: (B, V)."""
    position = torch.arange(len(token_ids), device=lm.device)[None]
    zeros = torch.zeros_like(position)
    mask = dense_mask(Coordinates(zeros, zeros, position // lm.block_size, zeros))
    model = inference_model(lm.model, "sdpa")
    output = model(torch.tensor([token_ids], device=lm.device), position_ids=position, attention_mask=mask)
    return output.logits[0, -lm.block_size :]


def slow_answer(lm: DiffusionLM, prompt_ids: list[int], decoding: Decoding) -> Trajectory:
    """The greedy answer of one sequence, without cache, batch or stop tokens."""
    size, unsampled = lm.block_size, torch.tensor(lm.unsampled_ids, device=lm.device)
    done, revealed_at, logprobs, forwards = list(prompt_ids), [0] * len(prompt_ids), [0.0] * len(prompt_ids), 0
    while len(done) < len(prompt_ids) + decoding.max_new_tokens:
        start = len(done) // size * size
        block = torch.tensor([*done[start:], *[lm.mask_token_id] * (size - len(done) + start)], device=lm.device)
        masked = block == lm.mask_token_id
        steps, scores, step = torch.zeros(size, dtype=torch.long), torch.zeros(size, device=lm.device), 0
        while masked.any():
            step, forwards = step + 1, forwards + 1
            logits = last_block(lm, done[:start] + block.tolist())[masked]
            full = temper(logits, 0.0, unsampled).log_softmax(-1)
            drawn = candidates(full, full, full.argmax(-1), decoding.confidence)
            owed = quota(torch.tensor([step], device=lm.device), size, decoding.denoising_steps)
            state = State(masked[None], drawn, owed, decoding.threshold, torch.tensor([start], device=lm.device))
            chosen = reveal(find_strategy(decoding.strategy), state)[0]
            block = torch.where(chosen, spread(drawn.tokens, masked), block)
            scores = torch.where(chosen, spread(drawn.logprobs, masked), scores)
            steps[chosen.cpu()] = step
            masked = masked & ~chosen
        given = len(done) - start
        done += block.tolist()[given:]
        revealed_at += steps.tolist()[given:]
        logprobs += scores.tolist()[given:]
    answer = slice(len(prompt_ids), None)
    return Trajectory(prompt_ids, done[answer], revealed_at[answer], logprobs[answer], "length", forwards, forwards)


@dataclass(frozen=True)
class Parting:
    """Where two answers part. after: how many answer tokens they share. margin: of the decision, in nats."""

    after: int
    what: str
    margin: float


def parting(lm: DiffusionLM, one: Trajectory, other: Trajectory, decoding: Decoding) -> Parting | None:
    """The first decision in which two greedy answers to a prompt differ, None if none.

    Its margin is, by the slow loop's logits, how much more likely one token is than the other, or how much more
    confident the model is at one place than at the other, or than the threshold.
    """
    prompt, size = one.prompt_ids, lm.block_size
    begin = 0
    while begin < len(one.token_ids):
        end = begin + size - (len(prompt) + begin) % size
        for step in range(1, size + 1):
            ours, theirs = (revealed(answer, begin, end, step) for answer in (one, other))
            if ours != theirs:
                known = [
                    token if at < step else lm.mask_token_id
                    for token, at in zip(one.token_ids[begin:end], one.reveal_step[begin:end], strict=True)
                ]
                logits = last_block(lm, prompt + one.token_ids[:begin] + known)[begin - end :]
                full = temper(logits, 0.0, torch.tensor(lm.unsampled_ids, device=lm.device)).log_softmax(-1)
                return Parting(begin, *decision(full, ours, theirs, decoding))
        begin = end
    return None


def revealed(answer: Trajectory, begin: int, end: int, step: int) -> dict[int, int]:
    """Tokens by their place in a stretch of an answer, of those that a step revealed."""
    return {i - begin: answer.token_ids[i] for i in range(begin, end) if answer.reveal_step[i] == step}


def decision(logprobs: Tensor, ours: dict[int, int], theirs: dict[int, int], decoding: Decoding) -> tuple[str, float]:
    """What was decided, and by what margin. logprobs: (places, V)."""
    for place in ours.keys() & theirs.keys():
        if ours[place] != theirs[place]:
            a, b = (logprobs[place, token].item() for token in (ours[place], theirs[place]))
            return f"token {ours[place]} or {theirs[place]}", abs(a - b)
    confidence = logprobs.amax(-1)
    only_ours, only_theirs = (
        [confidence[place].item() for place in a.keys() - b.keys()] for a, b in ((ours, theirs), (theirs, ours))
    )
    if decoding.strategy == "sequential":
        return "places, though their order is given", float("inf")
    if only_ours and only_theirs:
        return "places", min(abs(a - b) for a in only_ours for b in only_theirs)
    threshold = torch.tensor(decoding.threshold).log().item()
    return "how many", min(abs(a - threshold) for a in only_ours + only_theirs)
