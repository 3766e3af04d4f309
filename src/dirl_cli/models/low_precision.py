"""Second models that share what they can with the first: for forwards of their own, or in fewer bits."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def inference_model(model: PreTrainedModel, attention: str | None = None) -> PreTrainedModel:
    """A second model of the same tensors, in evaluation mode, whose modules and configuration are its own.

    What it is switched to the first does not notice, though that may be learning in another thread meanwhile.
    attention: the name of another attention implementation.
    """
    scales = [vars(module).get("quant_state") for module in model.modules()]  # of weights packed into 4 bits
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers(), *scales)}
    second = copy.deepcopy(model, tensors)
    if attention is not None:
        second.config._attn_implementation = attention
    return second.eval()


def cast_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` as autocast would run it, its linear layers' weights cast once; everything else is the same storage."""
    with torch.inference_mode(False), torch.no_grad():  # `recast` writes to them outside too
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
def recast(twin: PreTrainedModel, model: PreTrainedModel) -> None:
    """Cast the weights of `model` anew, in place."""
    own, other = (one.named_parameters(remove_duplicate=False) for one in (twin, model))
    for (_, cast), (_, weight) in zip(own, other, strict=True):
        if cast is not weight:
            cast.copy_(weight)
