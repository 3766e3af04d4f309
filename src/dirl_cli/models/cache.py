"""Keys and values of a batch whose sequences come and go, in the form transformers' decoders ask for."""

import torch
from torch import Tensor


class SlotCache:
    """Per layer (slots, heads, length, head_dim): a token's keys and values live at its slot and position.

    What a slot held before needs no clearing: the attention rule hides every position that was not rewritten.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def at(self, slots: Tensor, positions: Tensor, used: int) -> "SlotCache":
        """Aim the next forward: its batch rows are `slots` (N,), its tokens stand at `positions` (N, W)."""
        self.rows, self.positions, self.used = slots, positions, used
        return self

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store (N, heads, W, head_dim) and return what the queries may see, up to position `used`."""
        if layer == len(self.keys):
            shape = (self.slots, keys.shape[1], self.length, keys.shape[3])
            self.keys.append(keys.new_zeros(shape))
            self.values.append(values.new_zeros(shape))
        return self._store(self.keys[layer], keys), self._store(self.values[layer], values)

    def _store(self, kept: Tensor, new: Tensor) -> Tensor:
        kept[self.rows[:, None], :, self.positions] = new.transpose(1, 2)
        if len(self.rows) == self.slots:  # rows are ascending: all of them, no copy needed
            return kept[:, :, : self.used]
        return torch.index_select(kept[:, :, : self.used], 0, self.rows)
