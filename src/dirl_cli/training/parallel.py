"""How processes share a model: what `launch=` chooses, by Accelerate's FSDP2 plugin."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM, pick_device, pick_dtype
from dirl_cli.ranges import DEVICES
from dirl_cli.types import SHARING

PRECISION = {torch.float32: "no", torch.bfloat16: "bf16"}


def start_accelerator(device: str, dtype: str, launch: str = "auto") -> Accelerator:
    """This process's place among those of the run.

    device: auto, cpu or cuda. dtype: of the forward. launch: fsdp2 and zero2 share the model; with auto every process
    holds it.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise DirlError(f"device={device}: {DEVICES.hint(device)}")
    device = pick_device(device)
    AcceleratorState._reset_state(reset_partial_state=True)  # another run of this process may have had other settings
    in_place = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # else every gradient is there twice
    sharded = launch in SHARING
    uncached = AutocastKwargs(cache_enabled=not sharded)  # a cached cast would outlive the layer that was gathered
    plugin = fsdp2(keeps_gathered=launch == "zero2") if sharded else None
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=PRECISION[pick_dtype(dtype, device)],
        fsdp_plugin=plugin,
        kwargs_handlers=[in_place, uncached],
    )
    if sharded and accelerator.num_processes == 1:
        raise DirlError(f"launch={launch} shares a model among processes: give gpus=2 or more, or launch=single")
    if sharded and device == "cpu":  # where Accelerate ignores its plugin, though torch shards over gloo too
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


def fsdp2(keeps_gathered: bool) -> FullyShardedDataParallelPlugin:
    """Layer by layer. Parameters travel in float32 and are autocast as elsewhere, so that the numbers are the same.

    keeps_gathered: what a forward has gathered stays for its backward: ZeRO's second stage, where it is its third else.
    """
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=not keeps_gathered,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,
    )


def reshard(model: nn.Module) -> None:
    """Let go of what a forward without a backward may have gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unsharded(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, each made whole in turn where processes share it. Every process has to ask for all of them."""
    for name, tensor in named:
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsharded_model(lm: DiffusionLM, dtype: torch.dtype = torch.float32) -> DiffusionLM:
    """The model as one to sample from: itself, or where processes share its parameters a copy of all of them.

    dtype: of the copy's linear layers, which autocast casts to it in any case.
    """
    if not any(isinstance(parameter, DTensor) for parameter in lm.model.parameters()):
        return lm
    config = copy.deepcopy(lm.model.config)  # of which a model changes the dtype, and a sampler the attention
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    linear = {layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)}
    linear.discard(model.get_input_embeddings().weight)  # which may be the head's too
    made: dict[Tensor, Tensor] = {
        one: nn.Parameter(torch.empty(one.shape, dtype=dtype if one in linear else None, device=lm.device), False)
        for one in model.parameters()
    }
    made |= dict(zip(model.buffers(), lm.model.buffers(), strict=True))
    for module in model.modules():
        for name, one in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            setattr(module, name, made[one])
    model.load_state_dict(dict(unsharded(lm.model.named_parameters())), strict=False)  # tied ones are there once
    return replace(lm, model=model)
