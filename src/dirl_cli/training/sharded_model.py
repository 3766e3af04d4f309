"""A model that processes share from the moment it is there: none but the first ever holds all of it.

The first process loads it into its CPU's memory, with all that there is to refuse; the others get its modules without
weights. Then each allocates a layer, shards it, and goes on to the next, and the first sends tensor by tensor, of which
every process keeps its shard. So adapters that are merged, experts that are joined and weights that are tied come to
the shards as they come to a whole model. Embedding and head stay whole until the trainer takes the model: they belong
to what FSDP2 gathers around all layers.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from dirl_cli.errors import DirlError
from dirl_cli.models.experts import choose_experts
from dirl_cli.models.load import DiffusionLM, fitting_attention, learn_padding, pick_attention
from dirl_cli.models.low_precision import multiplied_weights
from dirl_cli.models.peft import Peft, move_scales
from dirl_cli.models.sharded_tensors import fill, is_sharded, unsharded

PATIENCE = timedelta(hours=4)  # in which the first process has loaded the model, from however slow a disk


def load_sharded(load: Callable[[], DiffusionLM], accelerator: Accelerator, attention: str) -> DiffusionLM:
    """The model that `load` gives on the CPU, its layers shared by all processes. Every process has to call.

    load: is called by the first process alone. attention: as the model's `load` takes it.
    Raises what `load` raises, in every process.
    """
    whole = None
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            whole = load()
            outcome = [without_weights(whole)]
        except DirlError as error:
            outcome = [error]

    # Over a group of its own, which waits longer than one whose messages are of a training step.
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    [lm] = outcome
    if isinstance(lm, DirlError):
        raise lm

    device = accelerator.device
    config = lm.model.config
    config._attn_implementation = fitting_attention(config, pick_attention(attention, device.type), device.type)
    keeps_gathered = not accelerator.state.fsdp_plugin.reshard_after_forward
    allocate(lm.model, device, shards=True, reshard_after_forward=not keeps_gathered)
    move_scales(lm.model, device)
    fill(lm.model, sent_by_first(lm.model, whole, device))
    choose_experts(lm.model)
    torch.distributed.destroy_process_group(group)
    return lm


def without_weights(lm: DiffusionLM) -> DiffusionLM:
    """The same model with its parameters on `meta`; what was one parameter is one, and buffers are as they are."""
    on_meta = {}  # what deepcopy takes for copied already, by id
    for parameter in lm.model.parameters():
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        on_meta[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    return copy.deepcopy(lm, on_meta)


def sent_by_first(
    model: PreTrainedModel, whole: DiffusionLM | None, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, full tensor) as the first process sends them, which forgets what it has sent.

    model: names, shapes and dtypes. whole: what the first process sends; None in the others.
    """
    sources = dict(whole.model.named_parameters()) if whole else {}
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if whole:
            source = sources.pop(name)
            tensor.copy_(source.detach())
            source.data = source.data.new_empty(0)
        torch.distributed.broadcast(tensor, src=0)
        yield name, tensor


def allocate(model: PreTrainedModel, device: torch.device, shards: bool, reshard_after_forward: bool = True) -> None:
    """Give the parameters of a model on `meta` memory on a device, in place, and its buffers too.

    shards: each layer is sharded before the next has its memory. reshard_after_forward: of such a layer.
    """
    kinds = model._no_split_modules or ()
    for layer in model.modules():
        if shards and type(layer).__name__ in kinds:
            materialise(layer, device)
            fully_shard(layer, reshard_after_forward=reshard_after_forward)
    materialise(model, device)


def materialise(root: nn.Module, device: torch.device) -> None:
    """Replace what is on `meta` in these modules by memory on the device, and bring their buffers there."""
    replacements: dict[Tensor, Tensor] = {}  # a tensor that two modules share stays one; none outlives the call
    for module in root.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and parameter not in replacements:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                replacements[parameter] = nn.Parameter(values, parameter.requires_grad)
            setattr(module, name, replacements.get(parameter, parameter))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, replacements.get(buffer, buffer.to(device)))


def share_root(model: nn.Module) -> None:
    """Shard what is around the layers too, in place, where these are sharded: of a model that no trainer takes."""
    if is_sharded(model):
        fully_shard(model)


# Further models with the weights of one that is shared


def reference_copy(lm: DiffusionLM, peft: Peft) -> DiffusionLM:
    """The model as it is before training, to stay near; where processes share it, a frozen copy that they share too."""
    if not is_sharded(lm.model):
        return peft.reference(lm)
    return second_model(lm, peft, shards=True)


def model_to_sample(lm: DiffusionLM, peft: Peft, dtype: torch.dtype = torch.float32) -> DiffusionLM:
    """A model without an adapter to sample from: of the same weights, or where these are sharded a copy of all.

    dtype: of the copy's linear layers and experts, which autocast casts to it in any case.
    """
    if not is_sharded(lm.model):
        return peft.merged(lm)
    return second_model(lm, peft, shards=False, dtype=dtype)


def second_model(
    lm: DiffusionLM, peft: Peft, shards: bool, dtype: torch.dtype = torch.float32, learns: bool = False
) -> DiffusionLM:
    """A copy of a model that processes share, its adapter merged. Every process has to call.

    shards: whether they share the copy too. dtype: of its linear layers and experts, where that is narrower. learns:
    whether its parameters have gradients.
    """
    # The copy's modules, without memory for the parameters yet.
    model = skeleton(lm).requires_grad_(learns)
    set_dtypes(model, kept_dtypes(lm), dtype)
    for buffer, trained_buffer in zip(named_buffers(model), named_buffers(lm.model), strict=True):
        (module, name, _), (_, _, values) = buffer, trained_buffer
        setattr(module, name, values)
    allocate(model, lm.device, shards)
    fill(model, unsharded(peft.pushed(lm)))
    return replace(lm, model=model)


def skeleton(lm: DiffusionLM) -> PreTrainedModel:
    """The model's modules without adapter and weights, on `meta`."""
    config = copy.deepcopy(lm.model.config)  # of which a model changes the dtype, and a sampler the attention
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    learn_padding(model)
    model.generation_config = copy.deepcopy(lm.model.generation_config)
    model.name_or_path = lm.model.name_or_path
    return model


def kept_dtypes(lm: DiffusionLM) -> dict[str, torch.dtype]:
    """The dtype of each weight, under the names of a model without an adapter."""
    return {name.replace(".base_layer.", "."): weight.dtype for name, weight in lm.model.named_parameters()}


def set_dtypes(model: PreTrainedModel, kept: dict[str, torch.dtype], narrow: torch.dtype) -> None:
    """Give a model on `meta` the dtypes in `kept`, and to what autocast casts `narrow` where that has fewer bytes."""
    multiplied = {weight for layer in model.modules() for weight in multiplied_weights(layer)}
    multiplied.discard(model.get_input_embeddings().weight)  # which may be the head's too
    for name, parameter in model.named_parameters():
        dtype = kept[name]
        if parameter in multiplied and narrow.itemsize < dtype.itemsize:
            dtype = narrow
        parameter.data = parameter.data.to(dtype)


def named_buffers(model: nn.Module) -> Iterable[tuple[nn.Module, str, Tensor]]:
    """Each buffer with the module that has it and its name there."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            yield module, name, buffer
