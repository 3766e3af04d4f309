"""LoRA adapters, through PEFT: merged into the weights that they were trained beside."""

import warnings
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from dirl_cli import hub
from dirl_cli.errors import DirlError, pip_install
from dirl_cli.models.safe_files import read_object


def merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Add an adapter to a model's weights, in place, and return the model.

    A head that shares its weight with the embedding comes to have its own where the adapter means only one of the two.
    adapter: a directory, or a downloaded Hub repository.
    Raises DirlError without PEFT, and where the adapter is not there, damaged or made for another model.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise DirlError(f"model.adapter needs the package peft ({error}): {pip_install('peft')}") from error
    directory = adapter_directory(adapter)
    head = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied weights, which are seen to below
        # PEFT says nothing of tensors that are missing or left over, so that they are looked for here.
        try:
            adapted = PeftModel(model, PeftConfig.from_pretrained(str(directory)))
            loaded = adapted.load_adapter(directory, "default", torch_device=str(model.device))
            strays = [*loaded.missing_keys, *loaded.unexpected_keys]
            reason = f"tensors that are not in both, such as {strays[0]}" if strays else None
        except (SafetensorError, ValueError, RuntimeError, TypeError, LookupError) as error:
            reason = " ".join(line.strip() for line in str(error).split("\n")[:2])
        if reason:
            raise DirlError(
                f"{adapter} cannot be merged into {model.name_or_path} ({reason}): give the model it was trained beside"
            )

        if is_tied:  # else what is added to the one is added to the other
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        merged = cast(PreTrainedModel, adapted.merge_and_unload())

    if is_tied:
        tie_if_equal(merged)
    return merged


def adapter_directory(adapter: str) -> Path:
    """Where an adapter is on this machine. Raises DirlError where it is not, or where it is no LoRA adapter."""
    if Path(adapter).is_dir() or adapter.count("/") != 1:
        directory = Path(adapter)
    else:
        directory = hub.local_snapshot(adapter, "model")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise DirlError(f"{adapter} has no {name}: give model.adapter the directory that PEFT saved an adapter in")

    config = read_object(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("megatron_config"):  # which names a module to import
        raise DirlError(f"{adapter} is no LoRA adapter, or one for Megatron: give one that PEFT saved as LORA")
    return directory


def tie_if_equal(model: PreTrainedModel) -> None:
    """Let head and embedding share their weight again, or have the configuration say that they differ."""
    head = cast(nn.Linear, model.get_output_embeddings())
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    model.config.tie_word_embeddings = torch.equal(head.weight, embedding.weight)
    if model.config.tie_word_embeddings:
        head.weight = embedding.weight
