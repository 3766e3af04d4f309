"""What a run trains: the whole model, or LoRA factors beside a frozen one, whose weights may be packed into 4 bits."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dirl_cli.errors import DirlError, did_you_mean, pip_install
from dirl_cli.files import atomic_directory
from dirl_cli.models.experts import choose_experts
from dirl_cli.models.load import DiffusionLM, fitting_attention, pick_attention, pick_dtype
from dirl_cli.models.low_precision import inference_model
from dirl_cli.models.sharded_tensors import full_tensor
from dirl_cli.ranges import Count, Seed, ShareBelowOne

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear

# Bytes of a weight in 4 bits, and of its part of the scales: a byte for 64 weights, and 4 bytes for 256 such scales.
PACKED_BYTES = 0.5
SCALE_BYTES = 1 / 64 + 4 / (64 * 256)


class ModelSource(Protocol):
    """The settings of a model, by which it is loaded."""

    def load(self, dtype: str, device: str, attention: str) -> DiffusionLM: ...


class Peft(Protocol):
    """What of a model is trained, and how the rest is kept: full fine-tuning, LoRA or QLoRA."""

    def require(self) -> None:
        """Raises DirlError where a package is missing."""
        ...

    def load(self, model: ModelSource, dtype: str, device: str, attention: str) -> DiffusionLM:
        """Load the model in the form in which it is trained. dtype: of the forward."""
        ...

    def adapt(self, model: PreTrainedModel) -> None:
        """Add an adapter in place, if one is trained; only what is trained requires gradients from now on."""
        ...

    def base_dtype(self, dtype: str, device: str) -> torch.dtype:
        """The dtype in which the base model's weights are kept. dtype: of the forward."""
        ...

    def weight_bytes(self, model: PreTrainedModel) -> int:
        """Bytes of an adapted model's parameters as they are kept, without scales."""
        ...

    def scale_bytes(self, model: PreTrainedModel) -> int:
        """Bytes of the scales of its quantised weights."""
        ...

    def merged(self, lm: DiffusionLM, device: str | None = None) -> DiffusionLM:
        """A model without an adapter, its weights those that were learned so far; a sampler follows with `pushed`.

        device: of the weights that are merged; None for where the adapted ones are. All others are shared.
        """
        ...

    def merged_bytes(self, model: PreTrainedModel) -> int:
        """Bytes of the weights that `merged` makes of an adapted model."""
        ...

    def pushed(self, lm: DiffusionLM) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, weight) of the model that `merged` makes, as they are now, one at a time."""
        ...

    def reference(self, lm: DiffusionLM) -> DiffusionLM:
        """The model as it was before training; to be called before that begins."""
        ...

    def save(self, lm: DiffusionLM, directory: Path, base: str | None, card: str, writes: bool = True) -> None:
        """Save the adapter, if one was trained, as PEFT does; every process of those that share it has to call.

        base: the model it belongs to. card: its README.md. writes: whether this process is the one that does.
        """
        ...


@dataclass(frozen=True)
class FullFinetune:
    """Full fine-tuning: all parameters are trained, and so are kept in float32."""

    def require(self) -> None:
        pass

    def load(self, model: ModelSource, dtype: str, device: str, attention: str) -> DiffusionLM:
        return model.load("float32", device, attention)

    def adapt(self, model: PreTrainedModel) -> None:
        pass

    def base_dtype(self, dtype: str, device: str) -> torch.dtype:
        return torch.float32

    def weight_bytes(self, model: PreTrainedModel) -> int:
        return sum(parameter.nbytes for parameter in model.parameters())

    def scale_bytes(self, model: PreTrainedModel) -> int:
        return 0

    def merged(self, lm: DiffusionLM, device: str | None = None) -> DiffusionLM:
        return lm

    def merged_bytes(self, model: PreTrainedModel) -> int:
        return 0

    def pushed(self, lm: DiffusionLM) -> Iterator[tuple[str, Tensor]]:
        return lm.model.named_parameters()

    def reference(self, lm: DiffusionLM) -> DiffusionLM:
        return replace(lm, model=copy.deepcopy(lm.model).requires_grad_(False).eval())

    def save(self, lm: DiffusionLM, directory: Path, base: str | None, card: str, writes: bool = True) -> None:
        pass


@dataclass(frozen=True)
class LoraFinetune:
    """LoRA: a target's weight W acts as W + B A alpha ÷ rank, and only A and B are trained.

    A (rank, in) and B (out, rank) are in float32 (https://arxiv.org/abs/2106.09685); W (out, in) stays as it is, in the
    dtype of the forward.
    targets: names of linear layers. dropout: of what goes into the factors. four_bit: pack the linear layers' weights
    (nf4, doubly quantised: https://arxiv.org/abs/2305.14314). seed: of the factors' start.
    """

    targets: tuple[str, ...]
    rank: Count
    alpha: Count
    dropout: ShareBelowOne
    four_bit: bool
    seed: Seed

    def require(self) -> None:
        packages = {"peft": "peft"}  # and the extras of this package that install them
        if self.four_bit:
            packages["bitsandbytes"] = "qlora"
        for package, extra in packages.items():
            if find_spec(package) is None:
                raise DirlError(f"this choice of peft needs the package {package}: {pip_install(extra)}")

    def load(self, model: ModelSource, dtype: str, device: str, attention: str) -> DiffusionLM:
        base_dtype = str(self.base_dtype(dtype, device)).removeprefix("torch.")
        if self.four_bit:
            # On the way to the device layers are packed one by one, so that it never holds all of the model unpacked.
            lm = model.load(base_dtype, "cpu", attention)
            config = lm.model.config
            config._attn_implementation = fitting_attention(config, pick_attention(attention, device), device)
            pack_into_4_bits(lm.model)
            nn.Module.to(lm.model, device)
            choose_experts(lm.model)
        else:
            lm = model.load(base_dtype, device, attention)
        self.adapt(lm.model)
        return lm

    def adapt(self, model: PreTrainedModel) -> None:
        from peft import inject_adapter_in_model

        names = {name.rpartition(".")[2] for name in linear_layers(model)}
        for target in self.targets:
            if target not in names:
                raise DirlError(f"peft.targets={target}: {did_you_mean(target, sorted(names))}")

        # The factors' start depends on nothing but their seed, and what is drawn afterwards not on them.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            inject_adapter_in_model(self._config(), model)
        for parameter in trainable_parameters(model).values():
            parameter.data = parameter.data.float()
        model.eval()

    def base_dtype(self, dtype: str, device: str) -> torch.dtype:
        return pick_dtype(dtype, device)

    def weight_bytes(self, model: PreTrainedModel) -> int:
        total = sum(parameter.nbytes for parameter in model.parameters())
        for weight in self._packed(model):
            total -= weight.nbytes - int(weight.numel() * PACKED_BYTES)
        return total

    def scale_bytes(self, model: PreTrainedModel) -> int:
        return int(SCALE_BYTES * sum(weight.numel() for weight in self._packed(model)))

    def _packed(self, model: PreTrainedModel) -> list[Tensor]:
        """The weights that are packed into 4 bits."""
        return [layer.weight for _, layer in frozen_linears(model) if self.four_bit]

    def merged_bytes(self, model: PreTrainedModel) -> int:
        adapted = lora_layers(model)
        return sum(layer.weight.nbytes for name, layer in frozen_linears(model) if self.four_bit or name in adapted)

    def merged(self, lm: DiffusionLM, device: str | None = None) -> DiffusionLM:
        merged = without_adapter(lm.model)
        for name, weight in effective_weights(lm.model):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.to(device or weight.device), requires_grad=False)
            linear.bias = cast(nn.Linear, merged.get_submodule(name)).bias
            merged.set_submodule(name, linear)
        return replace(lm, model=merged)

    def pushed(self, lm: DiffusionLM) -> Iterator[tuple[str, Tensor]]:
        # First what `merged` made anew, then what it shares, under the names of a model without an adapter.
        merged_names = set()
        for name, weight in effective_weights(lm.model):
            merged_names.add(f"{name}.weight")
            yield f"{name}.weight", weight
        for name, parameter in lm.model.named_parameters():
            name = name.replace(".base_layer.", ".")
            if not parameter.requires_grad and name not in merged_names:
                yield name, parameter

    def reference(self, lm: DiffusionLM) -> DiffusionLM:
        # No copy: the weights beside the factors never change.
        return replace(lm, model=without_adapter(lm.model))

    def save(self, lm: DiffusionLM, directory: Path, base: str | None, card: str, writes: bool = True) -> None:
        config = self._config()
        config.base_model_name_or_path = base
        config.inference_mode = True
        config.target_modules = sorted(self.targets)  # PEFT makes a set of them, whose order differs from run to run

        tensors = {}
        for name, factor in trainable_parameters(lm.model).items():
            name_in_file = name.replace(".default.", ".")  # `default` is the adapter's name in the model
            tensors[f"base_model.model.{name_in_file}"] = full_tensor(factor.detach()).cpu()
        if not writes:
            return

        with atomic_directory(directory) as partial:
            config.save_pretrained(str(partial))
            weights = partial / "adapter_model.safetensors"
            save_file(tensors, weights, metadata={"format": "pt"})
            # safetensors makes its files readable for their owner only
            weights.chmod((partial / "adapter_config.json").stat().st_mode)
            (partial / "README.md").write_text(card, encoding="utf-8")

    def _config(self) -> "LoraConfig":
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
        )


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of a model by name, but for the output head."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name; tied parameters once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def pack_into_4_bits(model: PreTrainedModel) -> None:
    """Have the linear layers' weights packed into 4 bits when they are next moved to a device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in linear_layers(model).items():
        weight = layer.weight.data
        # The packed bytes are stored as floating-point numbers: FSDP2 shards no others.
        nf4 = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": weight.dtype}
        # `Linear4bit` takes (in, out), and a weight is (out, in).
        packed = Linear4bit(*reversed(weight.shape), bias=False, compute_dtype=weight.dtype, device="meta", **nf4)
        packed.weight = Params4bit(weight, requires_grad=False, module=packed, **nf4)
        packed.bias = layer.bias
        packed.support_avx512bf16_for_cpu = False  # with which it would round its weights once more, in place
        model.set_submodule(name, packed)
    vars(model)["is_loaded_in_4bit"] = True  # PEFT asks


def move_scales(model: PreTrainedModel, device: torch.device) -> None:
    """Bring the scales that unpack 4-bit weights to a device, in place. The packed weights stay where they are."""
    for layer in linear_layers(model).values():
        if state := getattr(layer, "quant_state", None):
            state.to(device)


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of the same tensors that leaves the adapter out."""
    base = inference_model(model)
    for name, layer in lora_layers(base).items():
        base.set_submodule(name, layer.get_base_layer())
    vars(base).pop("peft_config", None)  # by which PEFT would know an adapter that is not there
    return base


@torch.no_grad()
def effective_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, effective weight) of every linear layer with LoRA factors or 4-bit storage."""
    factors = lora_layers(model)
    for name, layer in frozen_linears(model):
        weight = dequantised(layer)  # (out, in)
        if name in factors:
            with torch.autocast(weight.device.type, enabled=False):  # the factors' product is not to be rounded
                effective = (weight + factors_product(factors[name])).to(weight.dtype)
            yield name, effective
        elif weight is not layer.weight:
            yield name, weight


def factors_product(layer: "LoraLinear") -> Tensor:
    """What a layer's factors add to its weight: B A alpha ÷ rank, (out, in). Of sharded ones every process has it."""
    a = full_tensor(cast(nn.Linear, layer.lora_A["default"]).weight)  # (rank, in)
    b = full_tensor(cast(nn.Linear, layer.lora_B["default"]).weight)  # (out, rank)
    return (b @ a) * layer.scaling["default"]


def frozen_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (name without an adapter, layer) of the linear layers whose weights are frozen."""
    for name, layer in linear_layers(model).items():
        if not layer.weight.requires_grad:
            yield name.removesuffix(".base_layer"), layer


def lora_layers(model: nn.Module) -> "dict[str, LoraLinear]":
    """The layers with LoRA factors, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: cast("LoraLinear", layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def dequantised(layer: nn.Linear) -> Tensor:
    """A layer's full weight, dequantised: (out, in). One that is neither packed nor sharded is returned itself."""
    weight = full_tensor(layer.weight)
    state = getattr(layer, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)
