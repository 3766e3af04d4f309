"""How decoder layers are computed while a model learns: what they keep for backpropagation, compiled or not."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

Checkpointing = bool | Literal["attention"]

COMPILED_CODES = 64  # of one layer's code: for each model, with and without gradients, of one row and of several
ATTENTION = frozenset(
    (
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
    )
)


def checkpoint_layers(model: PreTrainedModel, checkpointing: Checkpointing) -> None:
    """Have each decoder layer keep only what goes into it, and compute the rest again in the backward.

    checkpointing: `attention` keeps what comes out of attention too, False everything.
    """
    if not checkpointing:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "attention":
        options["context_fn"] = keep_attention
    model.gradient_checkpointing_enable(options)


def keep_attention() -> Any:
    """The contexts of a checkpointed forward and of its repetition, which takes attention's output from the first."""
    return create_selective_checkpoint_contexts(policy)


def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether an operation's output is kept."""
    return CheckpointPolicy.MUST_SAVE if operation in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def compile_layers(model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each decoder layer, in place: names of parameters stay, and copies of the model are not compiled.

    All layers share one code, and so do rows of all lengths; it is made when it is first needed. backend: as
    torch.compile takes it.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_CODES)
    dynamo.optimize_ddp = False  # it cuts graphs where gradients are sent, and cannot cut one with FlexAttention
    for layer in model.get_decoder().layers:
        layer.compile(backend=backend, dynamic=True)
        # What is kept of a compiled layer is decided while it is compiled, so that this has to be part of it.
        if keeps_attention(layer):
            layer._gradient_checkpointing_func = torch.compile(
                layer._gradient_checkpointing_func, backend=backend, dynamic=True
            )


def keeps_attention(layer: Any) -> bool:
    """Whether a layer is checkpointed as `attention` says."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return isinstance(function, partial) and function.func is checkpoint and "context_fn" in function.keywords


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether a model's layers are compiled."""
    return any(layer._compiled_call_impl for layer in model.get_decoder().layers)


def pick_compile(setting: bool | Literal["auto"], device: str) -> bool:
    """Whether layers are compiled: as the setting says, auto on a GPU."""
    if setting == "auto":
        return device.startswith("cuda")
    return setting


def compile_seconds() -> float:
    """Seconds that this process has spent compiling so far."""
    spent = torch._dynamo.utils.calculate_time_spent()
    return float(spent.get("total_wall_time", 0.0))
