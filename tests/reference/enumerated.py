"""The specification, as code, of the policy: every answer of a model that has few, with its exact probability.

The sampler's own functions are walked: each candidate in turn is drawn with its probability, the strategy picks what
is revealed, and so on to the end of the answer. Candidates that are not revealed are forgotten.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from dirl_cli.diffusion.sampling import make_candidates
from dirl_cli.diffusion.unmasking import State, find_strategy, quota, reveal
from dirl_cli.models.load import DiffusionLM, diffusion_lm
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
from dirl_cli.types import Decoding
from tests.reference.sampling import scheduled


@dataclass(frozen=True)
class Way:
    """One way in which an answer comes about. probability: () as a function of the parameters."""

    token_ids: tuple[int, ...]
    reveal_step: tuple[int, ...]
    probability: Tensor


def toy(block_size: int, usable: int = 2) -> DiffusionLM:
    """A few tokens and the mask behind them, random and sharp."""
    config = SDARConfig(
        vocab_size=usable + 1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(10)
    model = SDARForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12.0)
    return diffusion_lm(model, None, block_size, usable)


def answers(lm: DiffusionLM, decoding: Decoding, prompt: Sequence[int]) -> Iterator[Way]:
    """Every answer to a prompt: whole blocks, up to the one in which a stop token stands or the answer is long enough.

    The first block may begin with the rest of the prompt.
    """
    whole = len(prompt) // lm.block_size * lm.block_size
    yield from _continued(lm, decoding, list(prompt[:whole]), list(prompt[whole:]), decoding.max_new_tokens)


def _continued(lm: DiffusionLM, decoding: Decoding, before: list[int], given: list[int], left: int) -> Iterator[Way]:
    masks = lm.block_size - len(given)
    opened = [*given, *[lm.mask_token_id] * masks]
    nothing = torch.full((1, lm.block_size), -1.0)
    for first in _filled(lm, decoding, before, opened, [0] * lm.block_size, nothing, step=1):
        token_ids, reveal_step = first.token_ids[len(given) :], first.reveal_step[len(given) :]
        if left <= masks or set(token_ids) & set(decoding.stop_token_ids):
            yield Way(token_ids, reveal_step, first.probability)
            continue
        for rest in _continued(lm, decoding, [*before, *first.token_ids], [], left - masks):
            probability = first.probability * rest.probability
            yield Way(token_ids + rest.token_ids, reveal_step + rest.reveal_step, probability)


def _filled(
    lm: DiffusionLM,
    decoding: Decoding,
    before: list[int],
    block: list[int],
    revealed_at: list[int],
    earlier: Tensor,
    step: int,
) -> Iterator[Way]:
    """Every way to fill what is masked of a block. earlier: (1, B) confidence at reveal, -1 where there was none."""
    places = [place for place, token in enumerate(block) if token == lm.mask_token_id]
    if not places:
        yield Way(tuple(block), tuple(revealed_at), torch.ones(()))
        return

    logits = _block_logits(lm, before, block)[:, : lm.mask_token_id].float()
    probabilities = logits.softmax(-1)
    following: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
    remembered = {}  # by state, which says all that confidences depend on
    for tokens in product(range(lm.mask_token_id), repeat=len(places)):
        chosen, confidences = _chosen(logits, tokens, places, earlier, step, decoding)
        filled, at = list(block), list(revealed_at)
        probability = torch.ones(())
        for place, token in zip(places, tokens, strict=True):
            probability = probability * probabilities[place, token]
            if chosen[place]:
                filled[place], at[place] = token, step
        state = (tuple(filled), tuple(at))
        following[state] = following.get(state, torch.zeros(())) + probability
        remembered[state] = confidences

    for (filled, at), probability in following.items():
        for rest in _filled(lm, decoding, before, list(filled), list(at), remembered[filled, at], step + 1):
            yield Way(rest.token_ids, rest.reveal_step, probability * rest.probability)


def _block_logits(lm: DiffusionLM, before: list[int], block: list[int]) -> Tensor:
    """(B, V) of a block behind whole blocks."""
    state = torch.tensor([before + block])
    number = torch.arange(state.shape[1]) // lm.block_size
    seen = number[:, None] >= number[None, :]
    return lm.model(input_ids=state, attention_mask=seen[None, None]).logits[0, len(before) :]


def _chosen(
    logits: Tensor, tokens: tuple[int, ...], places: list[int], earlier: Tensor, step: int, decoding: Decoding
) -> tuple[list[bool], Tensor]:
    """What the sampler reveals when `tokens` are the candidates it draws at the masked places, and `earlier` after it.

    logits: (B, V). earlier: (1, B).
    """
    masked = torch.zeros(len(logits), dtype=torch.bool)
    masked[places] = True
    of_masked = logits.detach()[masked]  # (N, V)

    logprobs = of_masked.log_softmax(-1)
    drawn = make_candidates(logprobs, logprobs, torch.tensor(tokens), decoding.confidence)
    owed = quota(torch.tensor([step]), len(masked), decoding.denoising_steps)
    threshold = scheduled(decoding, step, len(masked)) if decoding.is_threshold_scheduled else decoding.threshold
    state = State(masked[None], drawn, owed, threshold, None, decoding.lowest_threshold, earlier)
    revealed = reveal(find_strategy(decoding.strategy), state)
    return revealed[0].tolist(), torch.where(revealed, state.confidence, earlier)
