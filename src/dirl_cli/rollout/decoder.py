"""One forward of the decoder over a packed row whose keys and values go to their slots."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from dirl_cli.models.cache import SLOTS, Attend, SlotCache
from dirl_cli.models.narrow import inference_model

Integers = NDArray[np.int64]


def slot_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model as `decode` takes it, whatever attention it was loaded with. It follows the weights of `model`."""
    return inference_model(model, SLOTS)


def one_before(hidden: Tensor, edge: Tensor) -> Tensor:
    """For each token of some blocks the hidden state of the token before it. hidden: (N, B, D). edge: (N, D)."""
    return torch.cat([edge[:, None], hidden[:, :-1]], 1)


def decode(
    model: PreTrainedModel, cache: SlotCache, token_ids: Tensor, position: Tensor, places: Tensor, attend: Attend
) -> Tensor:
    """Hidden states (T, D) of tokens at `places`, each slot * length + position: (T,) all.

    model: one of `slot_model`.
    """
    output = model.get_decoder()(
        input_ids=token_ids[None],
        position_ids=position[None],
        past_key_values=cache.at(places),
        use_cache=False,
        attend=attend,
    )
    return output.last_hidden_state[0]
