"""The specification, as code, of the published sampler: S forwards to fill a block, one more to cache it.

One sequence at a time on plain transformers; also what `benchmarks` measure the engines against.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from dirl_cli.models.load import DiffusionLM


@torch.inference_mode()
def reference_sample(
    lm: DiffusionLM, prompt_ids: list[int], new_tokens: int, steps: int, trace: list[list[int]] | None = None
) -> tuple[list[int], int]:
    """Greedy, `low_confidence_static`; returns the answer and the number of forwards, caching ones included.

    trace: instead, the step at which each token of a block is revealed, of as many blocks as then come again.
    """
    size, model = lm.block_size, lm.model
    cache = DynamicCache(config=model.config)
    prefix = len(prompt_ids) // size * size
    forwards = 0

    def forward(token_ids: Tensor, start: int) -> Tensor:
        nonlocal forwards
        forwards += 1
        positions = torch.arange(start, start + len(token_ids))
        visible = torch.arange(start + len(token_ids))
        mask = visible[None] // size <= positions[:, None] // size
        output = model(token_ids[None], position_ids=positions[None], attention_mask=mask[None, None],
                       past_key_values=cache, use_cache=True)  # fmt: skip
        return output.logits[0]

    sequence = list(prompt_ids)
    if prefix:
        forward(torch.tensor(prompt_ids[:prefix]), 0)
    for start in range(prefix, len(prompt_ids) + new_tokens, size):
        given = sequence[start:]
        block = torch.tensor([*given, *[lm.mask_token_id] * (size - len(given))])
        step = 0
        while (block == lm.mask_token_id).any():
            logits = forward(block, start).float()
            cache.crop(-size)
            logits[:, list(lm.unsampled_ids)] = -torch.inf
            confidence, candidates = logits.softmax(-1).max(-1)
            confidence[block != lm.mask_token_id] = -torch.inf
            owed = size // steps + (step < size % steps)
            chosen = confidence.topk(min(owed, int((block == lm.mask_token_id).sum()))).indices
            if trace:
                steps_of = torch.tensor(trace[start // size % len(trace)])
                steps_of[block != lm.mask_token_id] = size + 1
                chosen = (steps_of == steps_of.min()).nonzero()[:, 0]
            block[chosen] = candidates[chosen]
            step += 1
        forward(block, start)
        sequence = sequence[:start] + block.tolist()
    return sequence[len(prompt_ids) :], forwards
