"""Linear layers whose weights lie side by side in one tensor, so that one product computes them all."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes: wherever a weight begins at a multiple of them, its products are the same to the bit


def join(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights and the biases of some layers that take the same input, each as one tensor.

    The layers' own become parts of these, so that whoever changes the one in place changes the other: an optimizer step
    needs no copying. The parameters stay the objects that they were. Returns (sum of out, in) and (sum of out,) or
    None.
    """
    weight = join_parameters([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return weight, join_parameters(biases) if biases else None


def can_join(layers: Sequence[nn.Module]) -> bool:
    """Whether these are plain linear layers of one dtype on one device, all or none of them with a bias.

    And whether, side by side, all begin at the ALIGNMENT: a run may join its weights later when it is continued than
    when it was not, and has to learn the same.
    """
    kinds = set()
    for layer in layers:
        if type(layer) is not nn.Linear or not layer.weight.is_floating_point() or layer.weight.nbytes % ALIGNMENT:
            return False
        kinds.add((layer.weight.dtype, layer.weight.device, layer.in_features, layer.bias is None))
    return len(kinds) == 1


def join_parameters(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor whose consecutive parts are these parameters from now on, along their first dimension."""
    first = parameters[0]
    rows = sum(len(parameter) for parameter in parameters)
    # Not as tensors of inference, which could not learn afterwards.
    with torch.inference_mode(False), torch.no_grad():
        if not are_consecutive(parameters):
            joined = torch.cat([parameter.detach() for parameter in parameters])
            parts = joined.split([len(parameter) for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def are_consecutive(parameters: Sequence[Tensor]) -> bool:
    """Whether each begins in memory where the one before it ends, in one storage."""
    expected = parameters[0].data_ptr()
    for parameter in parameters:
        same_storage = parameter.untyped_storage().data_ptr() == parameters[0].untyped_storage().data_ptr()
        if not (parameter.is_contiguous() and same_storage and parameter.data_ptr() == expected):
            return False
        expected += parameter.nbytes
    return True
