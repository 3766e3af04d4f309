"""Keys and values of a batch whose sequences come and go, in the form transformers' decoders ask for.

Shapes: a forward of T tokens, of any slots; D values of a head (head_dim).
"""

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
    """Attention as transformers' decoders call it; the caller of the model gives `attend`, which computes it.

    query: (1, heads, T, D). key, value: what `KVCache.update` returned, (slots, length, key heads, D).
    """
    return attend(query[0].transpose(0, 1).to(key.dtype), key, value, scaling)[None], None


AttentionInterface.register(SLOTS, slot_attention)


class KVCache:
    """The KV cache: a token's keys and values live at its slot and position, per layer (slots, length, key heads, D).

    What a slot held before needs no clearing: nobody looks at a position that was not rewritten.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots = slots
        self.length = length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def at(self, index: Tensor) -> "KVCache":
        """Aim the next forward: its tokens go to `index` (T,), each slot * length + position."""
        self.index = index
        return self

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (1, key heads, T, D), and return all that it has."""
        # A layer's tensors are made when it first runs, since its heads and dtype are known only then; the dtype is
        # that of the values, because under autocast a norm leaves the keys wider.
        if layer == len(self.keys):
            shape = (self.slots, self.length, *values.shape[1::2])
            self.keys.append(values.new_zeros(shape))
            self.values.append(values.new_zeros(shape))
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cached.flatten(0, 1).index_copy_(0, self.index, new[0].transpose(0, 1).to(cached.dtype))
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, *args: object) -> int:
        """Zero: some decoders ask, before they look at the positions that they are given."""
        return 0

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Copy what slot `source` holds at its first `length` positions to another slot."""
        for cached in (*self.keys, *self.values):
            cached[slot, :length] = cached[source, :length]
