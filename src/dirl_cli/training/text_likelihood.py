"""How likely a model finds given texts: exactly from left to right, and by the evidence bound of random masks.

Both score some of a text's tokens given all before them, as a sampler would come to them: the blocks before a token's
are clean, and what stands behind it in its block is masked, also where the text ends inside a block. Temperature 1,
nothing truncated; mask token and ids that stand for no text are left out of the softmax.

* Left to right: Σ log p(x_i | x_<i, masks), the log-probability with which a decoder that reveals a block's tokens one
  by one from the left samples the text. It sums to one over all texts of a length.
* ELBO: Σ over runs of n tokens in a block of E_k (n/k) Σ_{i masked} log p(x_i | …), k uniform in 1 … n and the k masked
  tokens drawn uniformly (arXiv 2503.09573). A bound of the log-probability with which a decoder that reveals each
  block's tokens in a random order samples the text; not of the one from left to right.

Shapes: a text has L tokens in whole blocks of B, F of them scored, in R runs; V views; N scored tokens of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.layout import Rows, Strip, lay_out, pack
from dirl_cli.models.load import DiffusionLM
from dirl_cli.training.logprobs import LogprobModel


@dataclass(frozen=True)
class Text:
    """Token ids, and which of them are scored; the others are given."""

    token_ids: Sequence[int]
    scored: Sequence[bool]


def windows(text: Text, longest: int, context: int) -> list[Text]:
    """A text in pieces of at most `longest` tokens, each of its tokens scored in one, behind `context` or more others.

    The last piece begins as early as it can, as lm-eval cuts what it calls rolling. None has nothing scored.
    """
    pieces = [Text(text.token_ids[:longest], text.scored[:longest])]
    done = longest
    while done < len(text.token_ids):
        end = min(done + longest - context, len(text.token_ids))
        start = end - longest
        scored = [False] * (done - start) + list(text.scored[done:end])
        pieces.append(Text(text.token_ids[start:end], scored))
        done = end
    return [piece for piece in pieces if any(piece.scored)]


@dataclass(frozen=True)
class TokenLogprobs:
    """What a text's scored tokens are worth from left to right, in their order: (F,) each.

    logprobs: in nats. likeliest: whether greedy decoding from left to right would have come to each.
    """

    logprobs: list[float]
    likeliest: list[bool]

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclass(frozen=True)
class EvidenceBound:
    """A text's ELBO, in nats.

    draws: one unbiased estimate for each draw of masks. rate_logprobs, rate_tokens: over all draws, by masking rate
    from low to high, the sum of the masked tokens' log-probs, and their number.
    """

    draws: list[float]
    rate_logprobs: list[float]
    rate_tokens: list[int]

    @property
    def mean(self) -> float:
        return fmean(self.draws)

    @property
    def standard_error(self) -> float | None:
        """Of the mean, over the masks that were drawn; None for a single draw."""
        return stdev(self.draws) / sqrt(len(self.draws)) if len(self.draws) > 1 else None


@dataclass(frozen=True)
class MaskDraws:
    """How the ELBO's masks are drawn: `draws` times, each at `rates` levels of noise.

    Level j's share of masked tokens is uniform in (j / rates, (j + 1) / rates], rounded up to whole tokens: with as
    many rates as a block has tokens, every number of masked tokens once in each draw.
    """

    draws: int
    rates: int


@dataclass(frozen=True)
class TextStates:
    """The states that score a text: (V, L) each. masked: bool. scored: bool, a part of it. weight: of the scored."""

    masked: Tensor
    scored: Tensor
    weight: Tensor


@torch.no_grad()
def left_to_right(lm: DiffusionLM, texts: Sequence[Text], row_tokens: int) -> list[TokenLogprobs]:
    """The exact log-probs of each text's scored tokens. row_tokens: of a packed row; changes nothing but rounding."""
    by_position: list[dict[int, tuple[float, bool]]] = [{} for _ in texts]
    states = [left_to_right_states(text, lm) for text in texts]
    for tokens in scored_tokens(lm, texts, states, row_tokens):
        for i, text in enumerate(tokens.text):
            by_position[text][tokens.position[i]] = (tokens.logprob[i], tokens.is_likeliest[i])

    # Rows are packed by length: what stands later in a text may have come first.
    scores = []
    for by_place in by_position:
        in_order = [by_place[position] for position in sorted(by_place)]
        scores.append(
            TokenLogprobs([logprob for logprob, _ in in_order], [is_likeliest for _, is_likeliest in in_order])
        )
    return scores


@torch.no_grad()
def evidence_bound(
    lm: DiffusionLM, texts: Sequence[Text], masks: MaskDraws, generators: Sequence[Generator], row_tokens: int
) -> list[EvidenceBound]:
    """The ELBO of each text's scored tokens. generators: of each text's masks."""
    bounds = [EvidenceBound([0.0] * masks.draws, [0.0] * masks.rates, [0] * masks.rates) for _ in texts]
    pairs = zip(texts, generators, strict=True)
    states = [elbo_states(text, lm, masks, generator) for text, generator in pairs]
    for tokens in scored_tokens(lm, texts, states, row_tokens):
        for text, view, weight, logprob in zip(tokens.text, tokens.view, tokens.weight, tokens.logprob, strict=True):
            draw, rate = divmod(view % (masks.draws * masks.rates), masks.rates)
            bounds[text].draws[draw] += weight * logprob
            bounds[text].rate_logprobs[rate] += logprob
            bounds[text].rate_tokens[rate] += 1
    return bounds


def left_to_right_states(text: Text, lm: DiffusionLM) -> TextStates:
    """View v scores the token at place v of every block, with it and all behind it in its block masked."""
    scored = scored_flags(text, lm)  # (L,)
    place = torch.arange(len(scored)) % lm.block_size
    view = torch.arange(lm.block_size)[:, None]  # (V, 1)
    masked = place >= view
    return TextStates(masked, scored & (place == view), torch.ones(masked.shape))


def elbo_states(text: Text, lm: DiffusionLM, masks: MaskDraws, generator: Generator) -> TextStates:
    """View (o · draws + d) · rates + j: of the o-th run of each block what draw d masks at level j, all behind masked.

    A run is the scored tokens of a block that follow each other, n of them; k of them are masked and weigh n/k / rates.
    """
    scored = scored_flags(text, lm)
    if not scored.any():
        nothing = torch.zeros(1, len(scored), dtype=torch.bool)
        return TextStates(nothing, nothing, nothing.float())
    position = scored.nonzero().squeeze(1)  # (F,)
    block = position // lm.block_size
    begins = torch.ones(len(position), dtype=torch.bool)
    begins[1:] = (position.diff() > 1) | (block.diff() > 0)
    run = begins.cumsum(0) - 1  # (F,)
    sizes = run.bincount()  # (R,)
    run_block = block[begins]
    ordinal = torch.arange(len(sizes)) - torch.searchsorted(run_block, run_block)  # (R,), among its block's runs

    # How many tokens of each run are masked, and a random order of its tokens: the first of them are.
    shape = (masks.draws, masks.rates)
    noise = torch.rand(*shape, len(sizes), generator=generator, dtype=torch.float64)
    level = (torch.arange(masks.rates)[:, None] + noise) / masks.rates  # (draws, rates, R)
    hidden = (level * sizes).long().clamp(max=sizes - 1) + 1
    keys = run + torch.rand(*shape, len(position), generator=generator, dtype=torch.float64)  # (draws, rates, F)
    rank = keys.argsort(-1).argsort(-1) - (sizes.cumsum(0) - sizes)[run]
    chosen = (rank < hidden[..., run]).flatten(0, 1)  # (draws · rates, F)
    weight = (sizes / hidden / masks.rates)[..., run].flatten(0, 1).float()

    # A view holds one run of a block: an earlier one is there, and a later one is not there yet.
    views = []
    for o in range(int(ordinal.max()) + 1):
        of_ordinal = ordinal[run] == o  # (F,)
        behind = torch.zeros(len(scored), dtype=torch.bool)
        for last in position[of_ordinal & last_of_run(run)].tolist():
            behind[last + 1 : (last // lm.block_size + 1) * lm.block_size] = True
        shown = torch.zeros(len(chosen), len(scored), dtype=torch.bool)
        weights = torch.zeros(shown.shape)
        shown[:, position] = chosen & of_ordinal
        weights[:, position] = weight
        views.append(TextStates(shown | behind, shown, weights))
    return TextStates(
        torch.cat([view.masked for view in views]),
        torch.cat([view.scored for view in views]),
        torch.cat([view.weight for view in views]),
    )


def last_of_run(run: Tensor) -> Tensor:
    """Whether each token is the last of its run: (F,) bool."""
    return torch.cat([run.diff() > 0, torch.ones(1, dtype=torch.bool)])


def scored_flags(text: Text, lm: DiffusionLM) -> Tensor:
    """Which tokens are scored, to whole blocks: (L,) bool."""
    scored = torch.zeros(-(-len(text.scored) // lm.block_size) * lm.block_size, dtype=torch.bool)
    scored[: len(text.scored)] = torch.tensor(text.scored, dtype=torch.bool)
    return scored


@dataclass(frozen=True)
class ScoredTokens:
    """The scored tokens of a forward: (N,) each. text: which one. view, position: in it. logprob: in nats."""

    text: list[int]
    view: list[int]
    position: list[int]
    weight: list[float]
    logprob: list[float]
    is_likeliest: list[bool]


def scored_tokens(
    lm: DiffusionLM, texts: Sequence[Text], states: Sequence[TextStates], row_tokens: int
) -> Iterator[ScoredTokens]:
    """The scored tokens of the texts in their states, row by row."""
    strips: list[Strip] = []
    owners = []  # the text of each strip
    for i, (text, of_text) in enumerate(zip(texts, states, strict=True)):
        own = text_strips(text, of_text, lm, row_tokens)
        strips += own
        owners += [i] * len(own)
    if not strips:
        return

    model = LogprobModel(lm.model, lm.unsampled_ids).to(lm.device)
    for rows in pack(strips, row_tokens, lm.block_size, lm.pad_token_id).split(1):
        logprobs, _, is_likeliest = model(rows.to(lm.device))
        yield named_tokens(rows, owners, logprobs, is_likeliest)


def named_tokens(rows: Rows, owners: Sequence[int], logprobs: Tensor, is_likeliest: Tensor) -> ScoredTokens:
    """The scored tokens of rows with their scores (N,) under the names of texts and views. owners: text by strip."""
    return ScoredTokens(
        text=[owners[strip] for strip in rows.at_targets(rows.strip).tolist()],
        view=(rows.at_targets(rows.view) - 1).tolist(),
        position=rows.at_targets(rows.position).tolist(),
        weight=rows.weight.tolist(),
        logprob=logprobs.tolist(),
        is_likeliest=is_likeliest.tolist(),
    )


def text_strips(text: Text, states: TextStates, lm: DiffusionLM, row_tokens: int) -> list[Strip]:
    """A text in its states, cut into strips of about `row_tokens` tokens, each behind a clean copy of what it sees."""
    length = states.scored.shape[1]
    token_ids = torch.full((length,), lm.mask_token_id)  # what stands behind the text is not there yet
    token_ids[: len(text.token_ids)] = torch.tensor(text.token_ids, dtype=torch.long)
    strips = []
    for first, end in spans(states.scored, lm.block_size, row_tokens):
        within = torch.zeros(length, dtype=torch.bool)
        within[first * lm.block_size : end * lm.block_size] = True
        scored = states.scored & within
        strips.append(lay_out(token_ids, states.masked, scored, states.weight, lm.block_size, lm.mask_token_id))
    return strips


def spans(scored: Tensor, block_size: int, row_tokens: int) -> list[tuple[int, int]]:
    """Neighbouring blocks (first, end) to lay out together: as many as fit into a row, one where none does."""
    views_of_block = scored.view(len(scored), -1, block_size).any(-1).sum(0)  # (L / B,)
    blocks = views_of_block.nonzero().squeeze(1).tolist()
    result: list[tuple[int, int]] = []
    noised = 0  # tokens of the current span's noised blocks
    for block in blocks:
        own = int(views_of_block[block]) * block_size
        if result and block * block_size + noised + own <= row_tokens:
            result[-1] = (result[-1][0], block + 1)
            noised += own
        else:
            result.append((block, block + 1))
            noised = own
    return result
