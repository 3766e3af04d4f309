"""The states of sampled answers in the order in which their tokens were revealed, several steps at a time.

A model that is fine-tuned on them learns to reveal in one forward what took it `window` steps. The steps of each block
are cut into windows of so many; a state of a block is what stood there before one of its windows: all of the windows
before it is shown, the rest is hidden. Answers that were sampled in smaller blocks are cut in the model's own, in the
order of their forwards: so a model of large blocks learns from one of small ones.

Shapes: n answer tokens in b blocks, of at most W windows each.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Generator, Tensor

from dirl_cli.ranges import Count, NotNegative, OneOf


@dataclass(frozen=True)
class TraceWindows:
    """States of an answer's trace, `window` steps of a block taken for one.

    states: `every` state once, each a view. Or `drawn`: one of each block's, in proportion to the share of its tokens
    that is hidden to the power of `emphasis`, so that it is most often the first; 0 draws evenly.
    counted: of a state the tokens of the next `window`; all that are `masked`; or these by `path`, see `path_weight`.
    Of `every` state the latter two are averaged over a block's states: what is `drawn` with emphasis 0, in the mean.

    `every` and `window` is the trace method of dLLM-RL (arXiv 2509.06949, train/sft_sdar.py, `shrink`), in which each
    token counts once. `drawn` and `masked` is d3LLM's (arXiv 2601.07568), but that the share hidden is drawn and does
    not grow with the steps; its certainty is a setting of its own. `drawn` and `path` is the path loss of T3D (arXiv
    2602.12262, train/self_ddo_sdar_full.py, exponent 8): it cuts by tokens where this cuts by steps, and hides the
    tokens that were revealed first, which no sampler ever sees; here those that were still hidden are. Its other loss,
    against a reference model's choices, is not here.
    """

    window: Count
    states: Annotated[str, OneOf("every", "drawn")]
    emphasis: NotNegative
    counted: Annotated[str, OneOf("window", "masked", "path")]

    def along(self, revealed_at: Tensor | None) -> "TraceMasking":
        """The masking schedule of one answer. revealed_at: (n,), the forward that revealed each of its tokens.

        Without it the answer counts as written from left to right, a token a forward: the most states there may be.
        """
        return TraceMasking(self, revealed_at)


@dataclass(frozen=True)
class TraceMasking:
    """The states of one answer's trace as a masking schedule: see the head of masking.py for what goes in and out."""

    windows: TraceWindows
    revealed_at: Tensor | None

    def __call__(self, block: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        revealed_at = torch.arange(len(block)) if self.revealed_at is None else self.revealed_at
        block = torch.unique_consecutive(block, return_inverse=True)[1]  # (n,), from 0 without gaps
        window = step_in_block(block, revealed_at) // self.windows.window  # (n,)
        if self.windows.states == "every":
            first = torch.arange(int(window.max()) + 1)[:, None]  # (V, 1), the window that each view stands before
        else:
            first = drawn_windows(block, window, self.windows.emphasis, generator)[None, block]  # (1, n)
        masked = window >= first  # (V, n)

        if self.windows.counted == "window":
            return masked, (window == first).float()
        weight = masked.float()
        if self.windows.counted == "path":
            weight = path_weight(block, window, masked)
        if self.windows.states == "every":
            windows = (counts(block, window) > 0).sum(1)  # (b,), the states in which something of a block is hidden
            weight = weight / windows[block]
        return masked, weight


def drawn_windows(block: Tensor, window: Tensor, emphasis: float, generator: Generator) -> Tensor:
    """The window before which each block stands, drawn by what is then hidden: (b,)."""
    hidden = counts(block, window).flip(1).cumsum(1).flip(1)  # (b, W), tokens of the window and all after it
    chance = torch.where(hidden > 0, (hidden / hidden[:, :1]) ** emphasis, 0.0)
    return torch.multinomial(chance, 1, generator=generator).squeeze(1)


def step_in_block(block: Tensor, revealed_at: Tensor) -> Tensor:
    """How many other steps of its block were before the one that revealed each token: (n,), from (n,) and (n,)."""
    steps, index = torch.stack([block, revealed_at]).unique(dim=1, return_inverse=True)  # (2, S), sorted by block
    steps_of_block = steps[0].bincount()
    first = steps_of_block.cumsum(0) - steps_of_block
    return index - first[block]


def counts(block: Tensor, window: Tensor) -> Tensor:
    """How many tokens each window of each block has: (b, W)."""
    tokens = torch.zeros(int(block.max()) + 1, int(window.max()) + 1)
    return tokens.index_put((block, window), torch.ones(len(block)), accumulate=True)


def path_weight(block: Tensor, window: Tensor, masked: Tensor) -> Tensor:
    """What tokens count in T3D's path loss: those that are revealed sooner more. masked: (V, n). Returns (V, n).

    Where the G windows of a block that are still hidden reveal n_1 … n_G tokens, N_g up to and with the g-th, the loss
    is the mean over g of the mean over the first N_g tokens. In it a token of the g-th window counts
    Σ_{h ≥ g} 1 / (G N_h), here times N_G, so that tokens count 1 on average as elsewhere.
    """
    weights = []
    for view in masked:
        tokens = counts(block[view], window[view])  # a view hides a block's last windows, if any
        up_to = tokens.cumsum(1)  # (b, W), the N_h
        windows = (tokens > 0).sum(1, keepdim=True).clamp(min=1)  # (b, 1), the G
        share = torch.where(tokens > 0, 1 / (windows * up_to), 0.0)
        later = share.flip(1).cumsum(1).flip(1) * up_to[:, -1:]  # (b, W)
        weight = torch.zeros(len(block))
        weight[view] = later[block[view], window[view]]
        weights.append(weight)
    return torch.stack(weights)
