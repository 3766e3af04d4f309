"""Blocks as they are decoded inside SGLang: this toolkit's drawing and strategies on the logits of its forwards.

Nothing here imports SGLang, and nothing more than torch: it runs in SGLang's own environment, where dirl is installed
without what it depends on, and in the tests without SGLang.

Shapes: N blocks of B tokens in a forward; V vocabulary.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dirl_cli.diffusion.sampling import draw_candidates, draw_seed
from dirl_cli.diffusion.unmasking import (
    BUILT_IN,
    State,
    find_strategy,
    quota,
    reveal,
    spread,
    threshold_at,
    threshold_table,
)
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.types import SENT_AS_IT_IS, Decoding

VERSION = "0.5.23"  # of SGLang, whose code this was written to
ALGORITHM = "Dirl"  # as --dllm-algorithm names it
FIELD = "dirl"  # of a response's `meta_info`, the blocks; and of a request's `custom_params`, which form they have
FORM = 1  # of both; another number where they change
SENT = (*SENT_AS_IT_IS, "denoising_steps")  # of `Decoding`, by the same names in `custom_params`


@dataclass(frozen=True)
class BlockRule:
    """How the blocks of some requests are decoded. unsampled_ids: that are never drawn, the mask token among them."""

    decoding: Decoding
    unsampled_ids: tuple[int, ...]


@dataclass(frozen=True)
class BlockRequest:
    """What SGLang's request says of its blocks. key: see `request_key`."""

    rule: BlockRule
    key: int


@dataclass
class BlockState:
    """A block that is being denoised, from forward to forward.

    in_answer: (B,) bool, which tokens are not the prompt's. reveal_step: (B,), 0 where masked or the prompt's.
    logprobs, confidences: (B,) of revealed tokens, when they were revealed. step: denoising steps so far. forwards:
    these and the one that only cached. is_full: whether nothing is masked any more.
    """

    request: BlockRequest
    in_answer: Tensor
    is_full: bool
    reveal_step: Tensor = field(init=False)
    logprobs: Tensor = field(init=False)
    confidences: Tensor = field(init=False)
    step: int = 0
    forwards: int = 0

    def __post_init__(self) -> None:
        self.reveal_step = torch.zeros_like(self.in_answer, dtype=torch.long)
        self.logprobs = torch.zeros_like(self.in_answer, dtype=torch.float32)
        self.confidences = torch.zeros_like(self.logprobs)

    @cached_property
    def answer_tokens(self) -> int:
        """How many of its tokens are not the prompt's."""
        return int(self.in_answer.sum())

    def record(self, tokens: Tensor) -> dict[str, Any]:
        """What a client is told of a full block, in values of JSON. tokens: (B,)."""
        return {
            "token_ids": tokens[self.in_answer].tolist(),
            "reveal_step": self.reveal_step[self.in_answer].tolist(),
            "logprobs": self.logprobs[self.in_answer].tolist(),
            "denoise_forwards": self.step,
            "forwards": self.forwards,
        }


def open_blocks(in_answer: Tensor, requests: Sequence[BlockRequest]) -> list[BlockState]:
    """Blocks before their first step. in_answer: (N, B) bool, what is masked; none of a block that is all prompt."""
    full = (~in_answer).all(1).tolist()
    return [BlockState(*parts) for parts in zip(requests, in_answer.unbind(), full, strict=True)]


def denoise(states: Sequence[BlockState], tokens: Tensor, logits: Tensor, start: Tensor) -> list[bool]:
    """Reveal tokens of each block that is not full; returns which were so before, and which this forward only cached.

    tokens: (N, B), changed in place. logits: (N * B, V) of this forward. start: (N,) positions of first tokens.
    """
    was_full = [state.is_full for state in states]
    by_rule: dict[BlockRule, list[int]] = {}
    for row, state in enumerate(states):
        state.forwards += 1
        if not state.is_full:
            by_rule.setdefault(state.request.rule, []).append(row)
    for rule, rows in by_rule.items():
        reveal_rows(
            rule, [states[row] for row in rows], torch.tensor(rows, device=tokens.device), tokens, logits, start
        )
    return was_full


def reveal_rows(
    rule: BlockRule, states: Sequence[BlockState], rows: Tensor, tokens: Tensor, logits: Tensor, start: Tensor
) -> None:
    """One step of n blocks that are decoded alike. rows: (n,) which of N; the others as in `denoise`."""
    options = rule.decoding
    size = tokens.shape[1]
    device = tokens.device
    offsets = torch.arange(size, device=device)
    reveal_step = torch.stack([state.reveal_step for state in states])  # (n, B)
    confidences = torch.stack([state.confidences for state in states])
    masked = torch.stack([state.in_answer for state in states]) & (reveal_step == 0)
    step = torch.tensor([state.step + 1 for state in states], device=device)
    key = torch.tensor([state.request.key for state in states], device=device)

    # The same position, step and key as in the native engine, and so the same random numbers.
    position = start[rows, None] + offsets  # (n, B)
    seeds = draw_seed(key[:, None], position, step[:, None])[masked]
    drawn = draw_candidates(
        logits[(rows[:, None] * size + offsets)[masked]],
        seeds if options.temperature else None,
        options.temperature,
        options.top_k,
        options.top_p,
        options.confidence,
        torch.tensor(rule.unsampled_ids, device=device),
    )
    state_of_blocks = State(
        masked,
        drawn,
        quota(step, size, options.denoising_steps),
        threshold_at(options, threshold_table(options, size).to(device), step),
        start[rows],
        options.lowest_threshold,
        earlier=torch.where(reveal_step > 0, confidences, -1.0),
    )
    revealed = reveal(find_strategy(options.strategy), state_of_blocks)

    # Written back to each block, and the tokens to where SGLang's next forward reads them.
    tokens[rows] = torch.where(revealed, spread(drawn.tokens, masked).to(tokens.dtype), tokens[rows])
    reveal_step = torch.where(revealed, step[:, None], reveal_step)
    confidences = torch.where(revealed, state_of_blocks.confidence, confidences)
    logprobs = torch.where(revealed, spread(drawn.logprobs, masked), torch.stack([s.logprobs for s in states]))
    full = (~(masked & ~revealed)).all(1).tolist()
    for row, state in enumerate(states):
        state.reveal_step = reveal_step[row]
        state.confidences = confidences[row]
        state.logprobs = logprobs[row]
        state.step += 1
        state.is_full = full[row]


def custom_params(
    body: Mapping[str, Any], key: int, block_size: int, mask_token_id: int, unsampled_ids: Sequence[int]
) -> dict[str, Any]:
    """What a request tells `request_of` in its `custom_params`. body: see `server_sampler.body_of`."""
    return {
        FIELD: FORM,
        "key": key,
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "unsampled_ids": list(unsampled_ids),
        **{name: body[name] for name in SENT},
    }


def request_of(params: Mapping[str, Any], block_size: int, mask_token_id: int) -> BlockRequest:
    """What a request's `custom_params` say. block_size, mask_token_id: the server's.

    Raises DirlError for what the server decodes otherwise, and for a strategy that is not built in.
    """
    if params.get(FIELD) != FORM:
        raise DirlError("the request is of another version of dirl: install the same one in SGLang's environment")
    if params["block_size"] != block_size:
        raise DirlError(
            f"SGLang decodes blocks of {block_size} tokens and the model has blocks of {params['block_size']}: start it"
            f" with `block_size: {params['block_size']}` in the file of --dllm-algorithm-config"
        )
    if params["mask_token_id"] != mask_token_id:
        raise DirlError(
            f"SGLang masks with token {mask_token_id} and the model with {params['mask_token_id']}: serve it with"
            " `dirl serve`"
        )
    decoding = Decoding(**{name: params[name] for name in SENT})
    if decoding.strategy not in BUILT_IN:  # it would be imported, which is for those who start the server
        raise DirlError(f"strategy={decoding.strategy}: {did_you_mean(decoding.strategy, BUILT_IN)}")
    return BlockRequest(BlockRule(decoding, tuple(params["unsampled_ids"])), params["key"])


def plain_request(
    temperature: float, top_k: int, top_p: float, seed: int | None, name: str, mask_token_id: int
) -> BlockRequest:
    """A request of somebody else's, as of SGLang's own warm-up: by SGLang's parameters, revealed by our defaults.

    name: of the request, from which its random numbers are where it has no seed.
    """
    digest = hashlib.blake2b(f"{seed if seed is not None else name}".encode(), digest_size=8).digest()
    is_greedy = top_k == 1  # which is what SGLang makes of temperature 0
    decoding = Decoding(
        temperature=0.0 if is_greedy else temperature,
        top_k=0 if top_k >= 1 << 30 else top_k,  # SGLang's word for all
        top_p=top_p,
    )
    return BlockRequest(BlockRule(decoding, (mask_token_id,)), int.from_bytes(digest) >> 1)
