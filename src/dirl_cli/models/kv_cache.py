"""Keys and values of a batch whose sequences come and go, in the form transformers' decoders ask for."""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import AttentionInterface

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(queries (T, heads, D), a layer's keys and values (slots, length, key heads, D), scale) to (T, heads, D)."""

SLOTS = "dirl_slots"


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    attend: Attend,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What transformers' decoders call; key and value are what `KVCache.update` returned."""
    return attend(query[0].transpose(0, 1).to(key.dtype), key, value, scaling)[None], None


AttentionInterface.register(SLOTS, slot_attention)


class KVCache:
    """Per layer (slots, length, heads, head_dim): a token's keys and values live at its slot and position.

    What a slot held before needs no clearing: nobody looks at a position that was not rewritten.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def at(self, places: Tensor) -> "KVCache":
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

    def get_seq_length(self, *args: object) -> int:
        """What some decoders ask before they look at the positions that they are given."""
        return 0

    def share(self, source: int, slot: int, length: int) -> None:
        """Give `slot` what `source` holds at its first `length` positions."""
        for kept in (*self.keys, *self.values):
            kept[slot, :length] = kept[source, :length]
