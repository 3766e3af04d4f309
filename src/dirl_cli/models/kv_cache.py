"""Keys and values of a batch whose sequences come and go, in the form transformers' decoders ask for.

Shapes: a forward of T tokens, of any sequences; D values of a head (head_dim).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(queries (T, heads, D), a layer's keys and values (pages, page_size, key heads, D), scale) to (T, heads, D)."""

PAGES = "dirl_pages"


def paged_attention(
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

    query: (1, heads, T, D). key, value: what `KVCache.update` returned, (pages, page_size, key heads, D).
    """
    return attend(query[0].transpose(0, 1).to(key.dtype), key, value, scaling)[None], None


AttentionInterface.register(PAGES, paged_attention)


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in all layers. dtype: that of the values."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * key_heads * size * dtype.itemsize


class KVCache:
    """The KV cache: a token's keys and values live in a page of its sequence, at its offset in that.

    Each layer has pages of its own, all numbered alike: (pages, page_size, key heads, D). `rollout/pages.py` says which
    of them a sequence lies in. What a page held before needs no clearing: nobody looks at what was not rewritten.
    length: positions that the longest sequence has.
    """

    def __init__(self, pages: int, page_size: int, length: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self.length = length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rotations: Tensor | None = None  # of each position, kept by the decoder that computes them

    def at(self, index: Tensor) -> "KVCache":
        """Aim the next forward: its tokens go to `index` (T,), each page * page_size + offset."""
        self.index = index
        return self

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (1, key heads, T, D), and return all that it has."""
        key_heads, size = values.shape[1::2]
        all_keys, all_values = self.of_layer(layer, key_heads, size, values.dtype, values.device)
        for cached, new in ((all_keys, keys), (all_values, values)):
            cached.flatten(0, 1).index_copy_(0, self.index, new[0].transpose(0, 1).to(cached.dtype))
        return all_keys, all_values

    def of_layer(
        self, layer: int, key_heads: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """All keys and all values of a layer, to read and to write; made when it first runs.

        dtype: that of the values, because under autocast a norm leaves keys wider.
        """
        if layer == len(self.keys):
            shape = (self.pages, self.page_size, key_heads, size)
            self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
            self.values.append(torch.zeros(shape, dtype=dtype, device=device))
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, *args: object) -> int:
        """Zero: some decoders ask, before they look at the positions that they are given."""
        return 0

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of a page to another page."""
        for cached in (*self.keys, *self.values):
            cached[target, :tokens] = cached[source, :tokens]
