"""Packed rows and the one attention rule, which is inference, fine-tuning and reinforcement learning alike.

Every token of a packed row has coordinates: the `strip` and `sequence` it belongs to, its `position` in that
sequence, and its `view`: 0 for the clean copy, 1, 2, … for noised copies of a block.

Shapes: a strip has n tokens, m of them scored; a batch has R rows of L tokens, N of them scored; B is the block size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHARED = 0  # the sequence whose tokens belong to every sequence of their strip, such as a common prompt
PADDING = -1  # the strip of padding


class Coordinates(NamedTuple):
    """Where tokens stand; four integer tensors of one shape (or broadcastable against another's)."""

    strip: Tensor
    sequence: Tensor
    block: Tensor
    view: Tensor


def attends(q: Coordinates, k: Coordinates) -> Tensor:
    """The attention rule: a query sees earlier clean blocks of its sequence, and its own block in its own view."""
    same_sequence = (q.strip == k.strip) & ((q.sequence == k.sequence) | (k.sequence == SHARED))
    earlier_clean = (k.view == 0) & (k.block < q.block)
    own_block = (k.view == q.view) & (k.block == q.block)
    return same_sequence & (earlier_clean | own_block)


@dataclass(frozen=True)
class Strip:
    """Tokens that see each other and so stay in one row; n tokens, of which m are scored.

    token_ids, sequence, position, view: (n,).
    target_index: (m,) where the scored tokens stand. shifted_index: (m,) where what stands before each of them does.
    targets: (m,) the ids that belong there. weight: (m,) of each in the loss.
    """

    token_ids: Tensor
    sequence: Tensor
    position: Tensor
    view: Tensor
    target_index: Tensor
    shifted_index: Tensor
    targets: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Rows:
    """A packed batch: R rows of L tokens with their coordinates, N of them scored.

    token_ids, strip, sequence, position, view: (R, L), `strip` being its index in the packed list.
    target_index: (N,) where the scored tokens stand in the flattened rows, ascending: the logits there predict them.
    shifted_index: (N,) where what stands before each does, whose logits predict it under a logit shift: in its own
        view inside its block, in the clean copy at its block's start.
    targets: (N,) the ids that belong there. weight: (N,) of each in the loss.
    extras: more about each scored token, (N,) under a name, such as `advantage` or `old_logprobs`.
    block_masks: made of the coordinates once for each device, and shared by copies that have the same coordinates.
    """

    token_ids: Tensor
    strip: Tensor
    sequence: Tensor
    position: Tensor
    view: Tensor
    target_index: Tensor
    shifted_index: Tensor
    targets: Tensor
    weight: Tensor
    block_size: int
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    block_masks: dict[torch.device, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def coordinates(self) -> Coordinates:
        return Coordinates(self.strip, self.sequence, self.position // self.block_size, self.view)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, all views counted, without padding."""
        return int((self.strip != PADDING).sum())

    def at_targets(self, coordinate: Tensor) -> Tensor:
        """`coordinate`, of shape (R, L), at the scored tokens: (N,)."""
        return coordinate.flatten()[self.target_index]

    def with_extras(self, **extras: Tensor) -> "Rows":
        """The same rows with more about each scored token: (N,) each."""
        return replace(self, extras={**self.extras, **extras})

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on another device; masks are made there anew."""
        tensors: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                tensors[f.name] = value.to(device)
        return replace(self, **tensors, extras={name: extra.to(device) for name, extra in self.extras.items()})

    def split(self, rows_each: int) -> list["Rows"]:
        """The same rows as micro-batches of at most `rows_each`, each as wide as its longest row."""
        rows, width = self.token_ids.shape
        micro_batches = []
        for first in range(0, rows, rows_each):
            last = min(first + rows_each, rows)
            used = int((self.strip[first:last] != PADDING).sum(1).max())
            columns: dict[str, Any] = {name: getattr(self, name)[first:last, :used] for name in PER_TOKEN}

            # Indices into the flattened rows change with the rows' number and width.
            ends = self.target_index.new_tensor([first * width, last * width])
            inside = slice(*torch.searchsorted(self.target_index, ends).tolist())  # of the N, which are ascending
            flat_start = (self.target_index[inside] // width - first) * used
            micro_batches.append(
                replace(
                    self,
                    **columns,
                    target_index=flat_start + self.target_index[inside] % width,
                    shifted_index=flat_start + self.shifted_index[inside] % width,
                    targets=self.targets[inside],
                    weight=self.weight[inside],
                    extras={name: extra[inside] for name, extra in self.extras.items()},
                    block_masks={},
                )
            )
        return micro_batches


PER_TOKEN = ("token_ids", "strip", "sequence", "position", "view")


def lay_out(token_ids: Tensor, masked: Tensor, scored: Tensor, weight: Tensor, block_size: int, mask_id: int) -> Strip:
    """One sequence as a clean copy and the noised blocks that teach something.

    A view is a noised state of the whole sequence. A block is laid out in the views in which it holds a scored
    token, and clean where a later block will read it; nothing else costs a forward.

    token_ids: (L,), whole blocks. masked: (V, L) bool, what each of V views hides. scored: (V, L) bool, a part of
    `masked`. weight: (V, L).
    """
    is_laid_out = scored.view(len(scored), -1, block_size).any(-1)  # (V, L / B), by view and block
    laid_out = is_laid_out.nonzero()
    clean = 0  # tokens of the clean copy: all before the last block that is laid out
    if len(laid_out):
        clean = int(laid_out[:, 1].max()) * block_size
    view, position = is_laid_out.repeat_interleave(block_size, 1).nonzero(as_tuple=True)  # of the noised tokens
    states = torch.where(masked, mask_id, token_ids)  # (V, L)
    ids = torch.cat([token_ids[:clean], states[view, position]])  # (n,)

    is_scored = scored[view, position]
    target_view = view[is_scored]
    target_position = position[is_scored]
    target_index = clean + is_scored.nonzero().squeeze(1)  # (m,)

    # What stands before a block's first token is in the clean copy, where index and position are the same. Nothing
    # stands before the very first token.
    begins_block = target_position % block_size == 0
    shifted_index = torch.where(begins_block, target_position - 1, target_index - 1).clamp(min=0)
    return Strip(
        token_ids=ids,
        sequence=torch.full_like(ids, SHARED),
        position=torch.cat([torch.arange(clean), position]),
        view=torch.cat([torch.zeros(clean, dtype=torch.long), view + 1]),
        target_index=target_index,
        shifted_index=shifted_index,
        targets=token_ids[target_position],
        weight=weight[target_view, target_position],
    )


def join_strips(strips: Sequence[Strip], block_size: int) -> Strip:
    """Several sequences as one strip in which the clean blocks that all begin with stand once.

    Sequences are numbered from 1 in the order given; what they have in common is `SHARED`.
    """
    common = common_blocks(strips, block_size)
    first = strips[0]
    token_ids = [first.token_ids[:common]]
    sequence = [first.sequence[:common]]
    position = [first.position[:common]]
    view = [first.view[:common]]
    target_index = []
    shifted_index = []
    shift = 0  # how far a strip's own tokens move: by those of the strips before it
    for number, strip in enumerate(strips, start=SHARED + 1):
        own = len(strip) - common
        token_ids.append(strip.token_ids[common:])
        sequence.append(torch.full((own,), number))
        position.append(strip.position[common:])
        view.append(strip.view[common:])
        target_index.append(strip.target_index + shift)
        is_common = strip.shifted_index < common
        shifted_index.append(torch.where(is_common, strip.shifted_index, strip.shifted_index + shift))
        shift += own
    return Strip(
        token_ids=torch.cat(token_ids),
        sequence=torch.cat(sequence),
        position=torch.cat(position),
        view=torch.cat(view),
        target_index=torch.cat(target_index),
        shifted_index=torch.cat(shifted_index),
        targets=torch.cat([strip.targets for strip in strips]),
        weight=torch.cat([strip.weight for strip in strips]),
    )


def without_first(strip: Strip, count: int) -> Strip:
    """The strip without its first `count` positions, in whichever view; those after them stay where they are.

    None of them may be scored.
    """
    if not count:
        return strip
    stays = strip.position >= count
    index = stays.cumsum(0) - 1  # (n,), where each token that stays will stand
    return replace(
        strip,
        token_ids=strip.token_ids[stays],
        sequence=strip.sequence[stays],
        position=strip.position[stays],
        view=strip.view[stays],
        target_index=index[strip.target_index],
        shifted_index=index[strip.shifted_index].clamp(min=0),
    )


def common_blocks(strips: Sequence[Strip], block_size: int) -> int:
    """The number of tokens that all strips begin with and that are clean, unscored and whole blocks."""
    longest = min(int((strip.view == 0).sum()) for strip in strips)
    for strip in strips:
        if len(strip.target_index):
            longest = min(longest, int(strip.target_index.min()))
    first = strips[0].token_ids[:longest]
    is_same = torch.ones(longest, dtype=torch.bool)
    for strip in strips[1:]:
        is_same &= strip.token_ids[:longest] == first
    return int(is_same.cumprod(0).sum()) // block_size * block_size


def pack(strips: Sequence[Strip], row_tokens: int, block_size: int, pad_id: int) -> Rows:
    """Lay strips into rows of at most `row_tokens` tokens (more only where one strip has them), first fit by length."""
    bins = first_fit([len(strip) for strip in strips], row_tokens)
    return fill_rows(bins, dict(enumerate(strips)), block_size, pad_id)


def fill_rows(bins: Sequence[Sequence[int]], strips: Mapping[int, Strip], block_size: int, pad_id: int) -> Rows:
    """Rows of these strips, as wide as the longest. bins: by row, the numbers of the strips in it."""
    width = 0
    for row in bins:
        width = max(width, sum(len(strips[i]) for i in row))
    columns: dict[str, Any] = {name: torch.zeros(len(bins), width, dtype=torch.long) for name in PER_TOKEN}
    columns["token_ids"].fill_(pad_id)
    columns["strip"].fill_(PADDING)

    target_index = []
    shifted_index = []
    order = []  # of the strips, row by row
    for r, row in enumerate(bins):
        start = 0
        for i in row:
            strip = strips[i]
            span = slice(start, start + len(strip))
            for name in ("token_ids", "sequence", "position", "view"):
                columns[name][r, span] = getattr(strip, name)
            columns["strip"][r, span] = i
            target_index.append(strip.target_index + r * width + start)
            shifted_index.append(strip.shifted_index + r * width + start)
            order.append(i)
            start = span.stop
    return Rows(
        **columns,
        target_index=torch.cat(target_index),
        shifted_index=torch.cat(shifted_index),
        targets=torch.cat([strips[i].targets for i in order]),
        weight=torch.cat([strips[i].weight for i in order]),
        block_size=block_size,
    )


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most `capacity`, filled longest first."""
    bins: list[list[int]] = []
    free: list[int] = []  # what each bin still has room for
    open_bins: list[int] = []  # those with room for the shortest: the others need not be asked
    shortest = min(lengths, default=0)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        b = next((b for b in open_bins if free[b] >= lengths[i]), len(bins))
        if b == len(bins):
            bins.append([])
            free.append(capacity)
            open_bins.append(b)
        bins[b].append(i)
        free[b] -= lengths[i]
        if free[b] < shortest:
            open_bins.remove(b)
    return bins
