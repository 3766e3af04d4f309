"""Keys and values of a batch whose sequences come and go, in the form transformers' decoders ask for."""

from torch import Tensor


class SlotCache:
    """Per layer (slots, length, heads, head_dim): a token's keys and values live at its slot and position.

    What a slot held before needs no clearing: nobody looks at a position that was not rewritten.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def at(self, places: Tensor) -> "SlotCache":
        """Aim the next forward: its tokens stand at `places` (T,), each slot * length + position."""
        self.places = places
        return self

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store (1, heads, T, head_dim) and return the layer's keys and values, whole."""
        if layer == len(self.keys):  # in the dtype of the values: under autocast a norm leaves the keys wider
            shape = (self.slots, self.length, *values.shape[1::2])
            self.keys.append(values.new_zeros(shape))
            self.values.append(values.new_zeros(shape))
        for kept, new in ((self.keys[layer], keys), (self.values[layer], values)):
            kept.flatten(0, 1).index_copy_(0, self.places, new[0].transpose(0, 1).to(kept.dtype))
        return self.keys[layer], self.values[layer]

    def share(self, source: int, slot: int, length: int) -> None:
        """Give `slot` what `source` holds at its first `length` positions."""
        for kept in (*self.keys, *self.values):
            kept[slot, :length] = kept[source, :length]
