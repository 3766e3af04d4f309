"""Second models that share what they can with the first: for forwards of their own, or in fewer bits."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def inference_model(model: PreTrainedModel, attention: str | None = None) -> PreTrainedModel:
    """A second model of the same tensors, in evaluation mode, whose modules and configuration are its own.

    The first model does not notice what it is switched to, though it may be learning in another thread meanwhile.
    attention: the name of another attention implementation.
    """
    # What deepcopy finds in its memo, by id, it takes for copied already, and so shares.
    scales = [vars(module).get("quant_state") for module in model.modules()]  # of weights packed into 4 bits
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *scales)}
    second = copy.deepcopy(model, shared)
    if attention is not None:
        second.config._attn_implementation = attention
    return second.eval()


def cast_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A second model as autocast would run it, the weights of its linear layers and experts cast once to `dtype`.

    All other tensors share their storage with the first. `recast` follows changes of the first.
    """
    casts = {}
    with torch.inference_mode(False), torch.no_grad():  # `recast` writes to them outside too
        for layer in model.modules():
            for weight in multiplied_weights(layer):
                if weight.dtype.itemsize > dtype.itemsize:
                    casts[id(weight)] = nn.Parameter(weight.to(dtype), requires_grad=False)

    # As in `inference_model`, deepcopy shares what is in its memo; of a weight that was cast it finds the cast there.
    # The embedding is shared as a module, since its weight may be the head's too.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    embedding = model.get_input_embeddings()
    second = copy.deepcopy(model, {**shared, **casts, id(embedding): embedding})
    return second.eval()


def multiplied_weights(layer: nn.Module) -> list[torch.Tensor]:
    """The weights of a linear layer or of the experts of a mixture, whose products autocast casts."""
    if isinstance(layer, nn.Linear):
        return [layer.weight]
    return [parameter for parameter in layer.parameters(recurse=False) if parameter.ndim == 3]  # an expert each


@torch.no_grad()
def recast(second: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copy the weights of `model` into those that `second` had cast of them, in place."""
    casts = second.named_parameters(remove_duplicate=False)
    weights = model.named_parameters(remove_duplicate=False)
    for (_, cast), (_, weight) in zip(casts, weights, strict=True):
        if cast is not weight:
            cast.copy_(weight)
