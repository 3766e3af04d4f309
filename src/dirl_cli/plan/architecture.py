"""What of a model decides its memory: its parameters, their kinds and its widths, counted without its weights."""

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dirl_cli.models.peft import FullFinetune, Peft, trainable_parameters
from dirl_cli.training.optim import Optim


@dataclass(frozen=True)
class Architecture:
    """What a model's memory depends on.

    vocabulary_parameters, layer_parameters: in embedding and head, and in all else, without an adapter.
    trained: parameters with a gradient. weight_bytes: of all of them, as they are kept. scale_bytes: of what unpacks
    those in 4 bits. merged_bytes: of the weights that a sampler has instead of adapted ones. state_bytes: of its
    optimizer.
    queries, keys: heads × head_dim. inner: the MLP's width, or that of all `experts` a token goes to (0: there are
    none).
    """

    vocabulary_parameters: int
    layer_parameters: int
    trained: int
    weight_bytes: int
    scale_bytes: int
    merged_bytes: int
    state_bytes: int
    vocabulary: int
    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    experts: int

    @property
    def parameters(self) -> int:
        return self.vocabulary_parameters + self.layer_parameters

    @property
    def is_full_finetune(self) -> bool:
        """Whether all parameters are trained."""
        return self.trained == self.parameters


def architecture(
    config: PreTrainedConfig, optim: Optim, peft: Peft = FullFinetune(), dtype: torch.dtype = torch.float32
) -> Architecture:
    """Count a model's parameters and its optimizer's states, on tensors without storage.

    dtype: of the weights as they are kept.
    """
    # Shapes alone: a model of any size takes no memory here.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        parameters = sum(parameter.numel() for parameter in model.parameters())  # before an adapter adds its own
        peft.adapt(model)

    # An optimizer is built and stepped, so that whatever states it has are counted.
    with FakeTensorMode():
        use_fake_parameters(model)
        state_bytes = optimizer_bytes(model, optim)
        ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # one where they are tied
        vocabulary_parameters = sum(weight.numel() for weight in ends)

    # Of a mixture of experts a token goes through some, each of its own width.
    experts = getattr(config, "num_experts_per_tok", 0)
    inner = config.intermediate_size
    if experts:
        inner = experts * config.moe_intermediate_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        vocabulary_parameters=vocabulary_parameters,
        layer_parameters=parameters - vocabulary_parameters,
        trained=sum(parameter.numel() for parameter in trainable_parameters(model).values()),
        weight_bytes=peft.weight_bytes(model),
        scale_bytes=peft.scale_bytes(model),
        merged_bytes=peft.merged_bytes(model),
        state_bytes=state_bytes,
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        queries=config.num_attention_heads * head_dim,
        keys=config.num_key_value_heads * head_dim,
        inner=inner,
        experts=experts,
    )


def use_fake_parameters(model: nn.Module) -> None:
    """Replace parameters on `meta` by fake ones that say they are on a CPU, where optimizers can step them."""
    # One fake for a parameter, also where two modules share it: tied weights have their states once.
    fakes = {p: nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, fakes[parameter])


def optimizer_bytes(model: PreTrainedModel, optim: Optim) -> int:
    """Bytes of an optimizer's states, which its first step makes. The parameters have to be fake ones."""
    # A first step needs gradients; of what shape they are is all that counts.
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.empty_like(parameter)

    total = 0
    for optimizer in optim.build(model):
        with suppress(RuntimeError):  # one that looks at values finds none, but has made its states by then
            optimizer.step()
        for states in optimizer.state.values():
            total += sum(state.nbytes for state in states.values() if isinstance(state, Tensor))
    return total
