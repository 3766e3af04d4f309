"""How processes share a model: what `launch=` chooses, by Accelerate's FSDP2 plugin."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from dirl_cli.distributed import require_whole_groups
from dirl_cli.errors import DirlError
from dirl_cli.models.context import UNDIVIDED, ContextGroup
from dirl_cli.models.load import pick_device, pick_dtype
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
        PartialState().distributed_type = DistributedType.FSDP  # which every other state takes it from, again and again
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


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


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """The model and its optimizers as this process takes part in training them."""
    # Accelerate tells parameters apart by where their memory begins, and empty shards of a layer begin nowhere.
    sharded: list[tuple[dict[str, Any], int, DTensor]] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                if isinstance(parameter, DTensor):
                    sharded.append((group, i, parameter))

    if sharded:  # of such a model there is left what is around the layers
        accelerator.state.fsdp_plugin.auto_wrap_policy = None
    model, *wrapped = accelerator.prepare(model, *optimizers)
    for group, i, parameter in sharded:
        group["params"][i] = parameter
    return model, [one.optimizer for one in wrapped]
