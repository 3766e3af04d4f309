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
from dirl_cli.files import whole_directory
from dirl_cli.models.load import DiffusionLM, pick_attention, pick_dtype
from dirl_cli.models.low_precision import inference_model
from dirl_cli.ranges import Count, Seed, ShareBelowOne
from dirl_cli.types import SHARING

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear

PACKED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight in 4 bits: a byte for 64 of them, 4 for 256 such bytes


class ModelSource(Protocol):
    """A model's settings."""

    def load(self, dtype: str, device: str, attention: str) -> DiffusionLM: ...


class Peft(Protocol):
    """What of a model is trained, and how the rest is kept."""

    def require(self, launch: str) -> None:
        """Raises DirlError where a package is missing, or where `launch` does not go with it."""
        ...

    def load(self, model: ModelSource, dtype: str, device: str, attention: str) -> DiffusionLM:
        """The model as it is trained. dtype: of the forward."""
        ...

    def adapt(self, model: PreTrainedModel) -> None:
        """Add what is trained beside the weights; only parameters that are trained require gradients from now on."""
        ...

    def base_dtype(self, dtype: str, device: str) -> torch.dtype:
        """Of the weights as they are kept. dtype: of the forward."""
        ...

    def weight_bytes(self, model: PreTrainedModel) -> int:
        """What the parameters take as they are kept, of an adapted model."""
        ...

    def merged(self, lm: DiffusionLM, device: str | None = None) -> DiffusionLM:
        """A model whose weights hold what was learned so far; for a sampler, which takes news from `pushed`.

        device: of the weights that are made for it; by default that of the others.
        """
        ...

    def merged_bytes(self, model: PreTrainedModel) -> int:
        """What `merged` takes besides, of an adapted model."""
        ...

    def pushed(self, lm: DiffusionLM) -> Iterator[tuple[str, Tensor]]:
        """The weights of `merged` as they are now, made one at a time."""
        ...

    def reference(self, lm: DiffusionLM) -> DiffusionLM:
        """The model as it was before training; to be called before that begins."""
        ...

    def save(self, lm: DiffusionLM, directory: Path, base: str | None, card: str) -> None:
        """Write what was trained beside the weights, if anything was. base: the model it belongs to."""
        ...


@dataclass(frozen=True)
class FullFinetune:
    """All parameters are trained, and so are kept in float32."""

    def require(self, launch: str) -> None:
        pass

    def load(self, model: ModelSource, dtype: str, device: str, attention: str) -> DiffusionLM:
        return model.load("float32", device, attention)

    def adapt(self, model: PreTrainedModel) -> None:
        pass

    def base_dtype(self, dtype: str, device: str) -> torch.dtype:
        return torch.float32

    def weight_bytes(self, model: PreTrainedModel) -> int:
        return sum(parameter.nbytes for parameter in model.parameters())

    def merged(self, lm: DiffusionLM, device: str | None = None) -> DiffusionLM:
        return lm

    def merged_bytes(self, model: PreTrainedModel) -> int:
        return 0

    def pushed(self, lm: DiffusionLM) -> Iterator[tuple[str, Tensor]]:
        return lm.model.named_parameters()

    def reference(self, lm: DiffusionLM) -> DiffusionLM:
        return replace(lm, model=copy.deepcopy(lm.model).requires_grad_(False).eval())

    def save(self, lm: DiffusionLM, directory: Path, base: str | None, card: str) -> None:
        pass


@dataclass(frozen=True)
class LoraFinetune:
    """Two factors of `rank` beside each target, their product times alpha ÷ rank added (https://arxiv.org/abs/2106.09685).

    The factors are in float32; the weights stay as they are, in the dtype of the forward.
    targets: names of linear layers. dropout: of what goes into the factors. four_bit: pack the linear layers' weights
    (nf4, doubly quantised: https://arxiv.org/abs/2305.14314). seed: of the factors' start.
    """

    targets: tuple[str, ...]
    rank: Count
    alpha: Count
    dropout: ShareBelowOne
    four_bit: bool
    seed: Seed

    def require(self, launch: str) -> None:
        for package, extra in (("peft", "peft"), ("bitsandbytes", "qlora"))[: 1 + self.four_bit]:
            if find_spec(package) is None:
                raise DirlError(f"this choice of peft needs the package {package}: {pip_install(extra)}")
        if launch in SHARING:
            raise DirlError(f"launch={launch} shares out what is trained, which peft leaves small: give launch=auto")

    def load(self, model: ModelSource, dtype: str, device: str, attention: str) -> DiffusionLM:
        kept = str(self.base_dtype(dtype, device)).removeprefix("torch.")
        lm = model.load(kept, "cpu" if self.four_bit else device, attention)
        if self.four_bit:
            lm.model.config._attn_implementation = pick_attention(attention, device)
            pack_into_4_bits(lm.model)
            nn.Module.to(lm.model, device)  # which packs layer by layer, so that the device never holds all
        self.adapt(lm.model)
        return lm

    def adapt(self, model: PreTrainedModel) -> None:
        from peft import inject_adapter_in_model

        known = {name.rpartition(".")[2] for name in linear_layers(model)}
        for target in self.targets:
            if target not in known:
                raise DirlError(f"peft.targets={target}: {did_you_mean(target, sorted(known))}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            inject_adapter_in_model(self._config(), model)
        for parameter in trainable_parameters(model).values():
            parameter.data = parameter.data.float()
        model.eval()

    def base_dtype(self, dtype: str, device: str) -> torch.dtype:
        return pick_dtype(dtype, device)

    def weight_bytes(self, model: PreTrainedModel) -> int:
        packed = {id(layer.weight) for _, layer in frozen_linears(model)} if self.four_bit else set()
        return int(sum(p.numel() * PACKED_BYTES if id(p) in packed else p.nbytes for p in model.parameters()))

    def merged_bytes(self, model: PreTrainedModel) -> int:
        own = lora_layers(model)
        return sum(layer.weight.nbytes for name, layer in frozen_linears(model) if self.four_bit or name in own)

    def merged(self, lm: DiffusionLM, device: str | None = None) -> DiffusionLM:
        twin = without_adapter(lm.model)
        for name, weight in effective_weights(lm.model):
            own = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            own.weight = nn.Parameter(weight.to(device or weight.device), requires_grad=False)
            own.bias = cast(nn.Linear, twin.get_submodule(name)).bias
            twin.set_submodule(name, own)
        return replace(lm, model=twin)

    def pushed(self, lm: DiffusionLM) -> Iterator[tuple[str, Tensor]]:
        names = set()
        for name, weight in effective_weights(lm.model):
            names.add(f"{name}.weight")
            yield f"{name}.weight", weight
        for name, parameter in lm.model.named_parameters():
            plain = name.replace(".base_layer.", ".")
            if not parameter.requires_grad and plain not in names:
                yield plain, parameter

    def reference(self, lm: DiffusionLM) -> DiffusionLM:
        return replace(lm, model=without_adapter(lm.model))  # no copy: the weights beside the factors never change

    def save(self, lm: DiffusionLM, directory: Path, base: str | None, card: str) -> None:
        config = self._config()
        config.base_model_name_or_path, config.inference_mode = base, True
        config.target_modules = sorted(self.targets)  # PEFT makes a set of them, whose order differs from run to run
        factors = {name.replace(".default.", "."): factor for name, factor in trainable_parameters(lm.model).items()}
        with whole_directory(directory) as partial:
            config.save_pretrained(str(partial))
            tensors = {f"base_model.model.{name}": factor.detach().cpu() for name, factor in factors.items()}
            save_file(tensors, file := partial / "adapter_model.safetensors", metadata={"format": "pt"})
            file.chmod((partial / "adapter_config.json").stat().st_mode)  # which safetensors makes its owner's only
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
    """The linear layers of a model that has no adapter, the output head left out."""
    head = model.get_output_embeddings()
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def pack_into_4_bits(model: PreTrainedModel) -> None:
    """Have the linear layers' weights packed into 4 bits when they are next moved to a device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    nf4 = {"compress_statistics": True, "quant_type": "nf4"}
    for name, layer in linear_layers(model).items():
        weight = layer.weight.data
        packed = Linear4bit(*reversed(weight.shape), bias=False, compute_dtype=weight.dtype, device="meta", **nf4)
        packed.weight, packed.bias = Params4bit(weight, requires_grad=False, module=packed, **nf4), layer.bias
        packed.support_avx512bf16_for_cpu = False  # with which it would round its weights once more, in place
        model.set_submodule(name, packed)
    vars(model)["is_loaded_in_4bit"] = True  # PEFT asks


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The model that an adapter stands beside; all tensors are shared."""
    twin = inference_model(model)
    for name, layer in lora_layers(twin).items():
        twin.set_submodule(name, layer.get_base_layer())
    vars(twin).pop("peft_config", None)  # by which PEFT would know an adapter that is not there
    return twin


@torch.no_grad()
def effective_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Each linear layer whose weight is not there as it acts, being adapted or packed, with that weight."""
    factors = lora_layers(model)
    for name, layer in frozen_linears(model):
        weight = dequantised(layer)
        if name in factors:
            with torch.autocast(weight.device.type, enabled=False):  # the factors' product is not to be rounded
                acting = (weight + factors[name].get_delta_weight("default")).to(weight.dtype)
            yield name, acting
        elif weight is not layer.weight:
            yield name, weight


def frozen_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers whose weights are frozen, by their names without an adapter."""
    for name, layer in linear_layers(model).items():
        if not layer.weight.requires_grad:
            yield name.removesuffix(".base_layer"), layer


def lora_layers(model: nn.Module) -> "dict[str, LoraLinear]":
    from peft.tuners.lora import LoraLayer

    return {name: cast("LoraLinear", layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def dequantised(layer: nn.Linear) -> Tensor:
    """A layer's weight as it acts: itself, or what its 4 bits stand for."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state)
