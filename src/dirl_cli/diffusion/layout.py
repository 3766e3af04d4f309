"""Packed rows and the one attention rule, which is inference, fine-tuning and reinforcement learning alike.

Every token of a packed row has coordinates: the `group` and `sequence` it belongs to, its `position` in that
sequence, and its `view`: 0 for the clean copy, 1, 2, … for noised copies of a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHARED = 0  # the sequence whose tokens belong to every sequence of their group, such as a common prompt
PADDING = -1  # the group of padding


class Coordinates(NamedTuple):
    """Where tokens stand; four integer tensors of one shape (or broadcastable against another's)."""

    group: Tensor
    sequence: Tensor
    block: Tensor
    view: Tensor


def attends(q: Coordinates, k: Coordinates) -> Tensor:
    """The attention rule: a query sees earlier clean blocks of its sequence, and its own block in its own view."""
    same_sequence = (q.group == k.group) & ((q.sequence == k.sequence) | (k.sequence == SHARED))
    earlier_clean = (k.view == 0) & (k.block < q.block)
    own_block = (k.view == q.view) & (k.block == q.block)
    return same_sequence & (earlier_clean | own_block)


@dataclass(frozen=True)
class Strip:
    """Tokens that see each other and so stay in one row; n tokens, of which m are scored.

    token_ids, sequence, position, view: (n,). where: (m,) indices of scored tokens; before: (m,) of the tokens that
    stand before those; targets, weight: (m,).
    """

    token_ids: Tensor
    sequence: Tensor
    position: Tensor
    view: Tensor
    where: Tensor
    before: Tensor
    targets: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Rows:
    """A packed batch: R rows of L tokens with their coordinates, N of them scored.

    token_ids, group, sequence, position, view: (R, L), `group` being the strip's index in the packed list.
    where: (N,) indices of the scored tokens into the flattened rows, ascending. before: (N,) of what stands before
    each: in its own view inside its block, in the clean copy at its block's start. targets: (N,) what they should be.
    weight: (N,) of each in the loss. notes: more about each, (N,) under a name, such as its advantage.
    block_masks: made of the coordinates once for each device, and shared by copies that have the same coordinates.
    """

    token_ids: Tensor
    group: Tensor
    sequence: Tensor
    position: Tensor
    view: Tensor
    where: Tensor
    before: Tensor
    targets: Tensor
    weight: Tensor
    block_size: int
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    block_masks: dict[torch.device, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def coordinates(self) -> Coordinates:
        return Coordinates(self.group, self.sequence, self.position // self.block_size, self.view)

    @property
    def num_tokens(self) -> int:
        """Token-forwards without padding."""
        return int((self.group != PADDING).sum())

    def scored(self, coordinate: Tensor) -> Tensor:
        """`coordinate`, of shape (R, L), at the scored tokens: (N,)."""
        return coordinate.flatten()[self.where]

    def to(self, device: torch.device | str) -> "Rows":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved, notes={name: note.to(device) for name, note in self.notes.items()})

    def split(self, rows_each: int) -> list["Rows"]:
        """The same rows, at most `rows_each` at a time, each part as wide as its longest row."""
        width = self.token_ids.shape[1]
        row = self.where // width
        parts = []
        for first in range(0, len(self.token_ids), rows_each):
            last = min(first + rows_each, len(self.token_ids))
            used = int((self.group[first:last] != PADDING).sum(1).max())
            inside = (row >= first) & (row < last)
            where, before = (
                (row[inside] - first) * used + index[inside] % width for index in (self.where, self.before)
            )
            columns: dict[str, Any] = {name: getattr(self, name)[first:last, :used] for name in PER_TOKEN}
            parts.append(
                replace(
                    self,
                    **columns,
                    where=where,
                    before=before,
                    targets=self.targets[inside],
                    weight=self.weight[inside],
                    notes={name: note[inside] for name, note in self.notes.items()},
                    block_masks={},
                )
            )
        return parts


PER_TOKEN = ("token_ids", "group", "sequence", "position", "view")


def lay_out(token_ids: Tensor, masked: Tensor, scored: Tensor, weight: Tensor, block_size: int, mask_id: int) -> Strip:
    """One sequence as a clean copy and the noised blocks that teach something.

    A view is a noised state of the whole sequence. A block is laid out in the views in which it holds a scored
    token, and clean where a later block will read it; nothing else costs a forward.

    token_ids: (L,), whole blocks. masked: (V, L) bool, what each view hides. scored: (V, L) bool, a part of
    `masked`. weight: (V, L).
    """
    blocks = scored.view(len(scored), -1, block_size).any(-1)  # (V, L / block_size)
    laid_out = blocks.nonzero()
    clean = int(laid_out[:, 1].max()) * block_size if len(laid_out) else 0
    view, position = blocks.repeat_interleave(block_size, 1).nonzero(as_tuple=True)
    states = torch.where(masked, mask_id, token_ids)  # (V, L)
    is_scored = scored[view, position]
    view_scored, position_scored = view[is_scored], position[is_scored]
    ids = torch.cat([token_ids[:clean], states[view, position]])
    where = clean + is_scored.nonzero().squeeze(1)
    begins_block = position_scored % block_size == 0
    return Strip(
        token_ids=ids,
        sequence=torch.full_like(ids, SHARED),
        position=torch.cat([torch.arange(clean), position]),
        view=torch.cat([torch.zeros(clean, dtype=torch.long), view + 1]),
        where=where,
        before=torch.where(begins_block, position_scored - 1, where - 1).clamp(min=0),  # nothing is before the first
        targets=token_ids[position_scored],
        weight=weight[view_scored, position_scored],
    )


def join(strips: Sequence[Strip], block_size: int) -> Strip:
    """Several sequences of a group as one strip in which the clean blocks that all begin with stand once.

    Sequences are numbered from 1 in the order given; what they have in common is `SHARED`.
    """
    common = common_blocks(strips, block_size)
    own = [len(strip) - common for strip in strips]
    moved = [sum(own[:i]) for i in range(len(own))]
    return Strip(
        token_ids=torch.cat([strips[0].token_ids[:common], *(strip.token_ids[common:] for strip in strips)]),
        sequence=torch.cat(
            [strips[0].sequence[:common], *(torch.full((n,), i) for i, n in enumerate(own, start=SHARED + 1))]
        ),
        position=torch.cat([strips[0].position[:common], *(strip.position[common:] for strip in strips)]),
        view=torch.cat([strips[0].view[:common], *(strip.view[common:] for strip in strips)]),
        where=torch.cat([strip.where + n for strip, n in zip(strips, moved, strict=True)]),
        before=torch.cat(
            [
                torch.where(strip.before < common, strip.before, strip.before + n)
                for strip, n in zip(strips, moved, strict=True)
            ]
        ),
        targets=torch.cat([strip.targets for strip in strips]),
        weight=torch.cat([strip.weight for strip in strips]),
    )


def common_blocks(strips: Sequence[Strip], block_size: int) -> int:
    """How many tokens all strips begin with that are clean, unscored and whole blocks."""
    first = strips[0]
    n = min(int((strip.view == 0).sum()) for strip in strips)
    n = min([n, *(int(strip.where.min()) for strip in strips if len(strip.where))])
    same = torch.ones(n, dtype=torch.bool)
    for strip in strips[1:]:
        same &= strip.token_ids[:n] == first.token_ids[:n]
    return int(same.cumprod(0).sum()) // block_size * block_size


def pack(strips: Sequence[Strip], row_tokens: int, block_size: int, pad_id: int) -> Rows:
    """Lay strips into rows of at most `row_tokens` tokens (more only where one strip has them), first fit by length."""
    bins = first_fit([len(strip) for strip in strips], row_tokens)
    width = max(sum(len(strips[i]) for i in row) for row in bins)
    columns: dict[str, Any] = {name: torch.zeros(len(bins), width, dtype=torch.long) for name in PER_TOKEN}
    columns["token_ids"].fill_(pad_id)
    columns["group"].fill_(PADDING)
    where, before, order = [], [], []
    for r, row in enumerate(bins):
        start = 0
        for i in row:
            span = slice(start, start + len(strips[i]))
            for name in ("token_ids", "sequence", "position", "view"):
                columns[name][r, span] = getattr(strips[i], name)
            columns["group"][r, span] = i
            where.append(strips[i].where + r * width + start)
            before.append(strips[i].before + r * width + start)
            order.append(i)
            start = span.stop
    return Rows(
        **columns,
        where=torch.cat(where),
        before=torch.cat(before),
        targets=torch.cat([strips[i].targets for i in order]),
        weight=torch.cat([strips[i].weight for i in order]),
        block_size=block_size,
    )


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most `capacity`, filled longest first."""
    bins: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((b for b, room in enumerate(free) if room >= lengths[i]), None)
        if fitting is None:
            bins.append([i])
            free.append(capacity - lengths[i])
        else:
            bins[fitting].append(i)
            free[fitting] -= lengths[i]
    return bins
