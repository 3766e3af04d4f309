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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from dirl_cli.errors import DirlError
from dirl_cli.models.context import UNDIVIDED, ContextGroup
from dirl_cli.models.load import DiffusionLM, pick_device, pick_dtype
from dirl_cli.models.low_precision import multiplied_weights
from dirl_cli.ranges import DEVICES
from dirl_cli.types import SHARDED_LAUNCHES

PRECISION = {torch.float32: "no", torch.bfloat16: "bf16"}


def start_accelerator(device: str, dtype: str, launch: str = "auto") -> Accelerator:
    """The accelerator of this process, which joins those of the run.

    device: auto, cpu or cuda. dtype: of the forward. launch: fsdp2 and zero2 share the model; with auto every process
    holds it.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise DirlError(f"device={device}: {DEVICES.hint(device)}")
    device = pick_device(device)
    AcceleratorState._reset_state(reset_partial_state=True)  # another run of this process may have had other settings
    is_sharded = launch in SHARDED_LAUNCHES
    plugin = None
    if is_sharded:
        plugin = fsdp2(keeps_gathered=launch == "zero2")
    single_copy = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # else every gradient is there twice
    uncached = AutocastKwargs(cache_enabled=not is_sharded)  # a cached cast would outlive the layer that was gathered
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=PRECISION[pick_dtype(dtype, device)],
        fsdp_plugin=plugin,
        kwargs_handlers=[single_copy, uncached],
    )

    # Under a launcher of the user's own only the accelerator knows how many processes there are.
    if is_sharded and accelerator.num_processes == 1:
        raise DirlError(f"launch={launch} shares a model among processes: give gpus=2 or more, or launch=single")
    if is_sharded and device == "cpu":  # where Accelerate ignores its plugin, though torch shards over gloo too
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def require_whole_groups(size: int, processes: int) -> None:
    """Raises DirlError where so many processes are no multiple of those that divide a row."""
    if processes % size:
        raise DirlError(
            f"context_parallel={size} divides each row among so many processes, of which there are {processes}:"
            f" give gpus={size}, or a multiple of it"
        )


def context_group(accelerator: Accelerator, size: int) -> ContextGroup:
    """Those of the run's processes that divide rows with this one: `size` neighbours. All have to call.

    Parameters are shared out, and gradients summed, among all processes, as if none divided rows.
    """
    if size == 1:
        return UNDIVIDED
    processes = accelerator.num_processes
    require_whole_groups(size, processes)
    mesh = init_device_mesh(accelerator.device.type, (processes // size, size), mesh_dim_names=("data", "context"))
    return ContextGroup(mesh.get_group("context").group_name, size, mesh.get_local_rank("context"))


def fsdp2(keeps_gathered: bool) -> FullyShardedDataParallelPlugin:
    """FSDP2 layer by layer. Parameters travel in float32 and are autocast as elsewhere: the numbers are the same.

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
    """Reshard FSDP modules after a forward without a backward, which leaves full parameters behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unsharded(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, one by one as full tensors. Every process has to iterate over all: gathering is collective."""
    for name, tensor in named:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        yield name, tensor


def unsharded_model(lm: DiffusionLM, dtype: torch.dtype = torch.float32) -> DiffusionLM:
    """A model to sample from: the same one, or where its parameters are sharded a copy with all of them.

    dtype: of the copy's linear layers and experts, which autocast casts to it in any case.
    """
    if not any(isinstance(parameter, DTensor) for parameter in lm.model.parameters()):
        return lm

    # The copy's modules, without memory for the parameters yet.
    config = copy.deepcopy(lm.model.config)  # of which a model changes the dtype, and a sampler the attention
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    multiplied = {weight for layer in model.modules() for weight in multiplied_weights(layer)}
    multiplied.discard(model.get_input_embeddings().weight)  # which may be the head's too

    # A tensor that two modules share, such as a tied embedding, gets one replacement, so that it stays shared.
    replacements: dict[Tensor, Tensor] = {}
    for parameter in model.parameters():
        values = torch.empty(parameter.shape, dtype=dtype if parameter in multiplied else None, device=lm.device)
        replacements[parameter] = nn.Parameter(values, requires_grad=False)
    for buffer, trained_buffer in zip(model.buffers(), lm.model.buffers(), strict=True):
        replacements[buffer] = trained_buffer
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            setattr(module, name, replacements[tensor])

    model.load_state_dict(dict(unsharded(lm.model.named_parameters())), strict=False)  # tied ones are there once
    return replace(lm, model=model)
