"""A second model that shares what it can with the first and holds its linear layers in fewer bits."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def narrowed(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` as autocast would run it, its linear layers' weights cast once; everything else is the same storage."""
    with torch.inference_mode(False), torch.no_grad():  # `refresh` writes to them outside too
        cast = {
            id(layer.weight): nn.Parameter(layer.weight.to(dtype), requires_grad=False)
            for layer in model.modules()
            if isinstance(layer, nn.Linear) and layer.weight.dtype.itemsize > dtype.itemsize
        }
    embedding = model.get_input_embeddings()  # whose weight may be the head's too
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, {**shared, **cast, id(embedding): embedding})
    return twin.eval()


@torch.no_grad()
def refresh(twin: PreTrainedModel, model: PreTrainedModel) -> None:
    """Cast the weights of `model` anew, in place."""
    own, other = (one.named_parameters(remove_duplicate=False) for one in (twin, model))
    for (_, cast), (_, weight) in zip(own, other, strict=True):
        if cast is not weight:
            cast.copy_(weight)
