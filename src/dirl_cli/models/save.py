"""The published layout: weights in shards with an index, tokenizer, card, and the names that published models use."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
from huggingface_hub import create_repo, get_token, upload_folder
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from dirl_cli.errors import DirlError
from dirl_cli.files import atomic_directory

SHARD = "5GB"  # as published checkpoints are cut
LOCAL = ("auto_map", "is_local", "local_files_only")  # remote code that is not saved; how a tokenizer was read
RENAMED = {
    "dtype": "torch_dtype",
    "num_local_experts": "num_experts",
    "extra_special_tokens": "additional_special_tokens",
}


def save_published(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    card: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_size: str = SHARD,
) -> None:
    """Save a model in the published layout, whole or not at all.

    card: of its README.md. state_dict: the weights, where they are not the model's own. max_shard_size: of a weight
    file, such as 5GB.
    """
    transformers_logging.disable_progress_bar()
    with atomic_directory(directory) as partial:
        model.save_pretrained(partial, state_dict=state_dict, max_shard_size=max_shard_size)
        name_as_published(partial / "config.json")
        if tokenizer:
            tokenizer.save_pretrained(partial)
            name_as_published(partial / "tokenizer_config.json")
        # safetensors makes its files readable for their owner only
        for shard in partial.glob("*.safetensors"):
            shard.chmod((partial / "config.json").stat().st_mode)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")


def published_weights(
    model: PreTrainedModel, named_tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors as its files hold them, one after the other: each expert of a mixture by itself."""
    for name, tensor in named_tensors:
        yield from revert_weight_conversion(model, {name: tensor.detach()}).items()


def name_as_published(file: Path) -> None:
    """Rewrite a configuration with the names that published ones and engines use for what transformers 5 renamed."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for key in LOCAL:
        config.pop(key, None)
    for name, published_name in RENAMED.items():
        if name in config:
            config[published_name] = config.pop(name)
    if rope := config.get("rope_parameters"):
        config["rope_theta"] = rope["rope_theta"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def require_pushable(repository: str | None) -> None:
    """Raises DirlError where a push to `repository` is asked for and could not succeed."""
    if repository is None:
        return
    try:
        _owner, _name = repository.split("/")
        validate_repo_id(repository)
    except ValueError as error:
        raise DirlError(f"push_to_hub={repository} is no name on the Hub: give OWNER/NAME") from error
    if get_token() is None:
        raise DirlError(f"push_to_hub={repository} needs a token of the Hub: run `hf auth login` first")


def push(directory: Path, repository: str) -> str:
    """Upload a saved model, into a private repository if it is not there yet; returns the address.

    Raises DirlError, which says how to push it later.
    """
    try:
        address = create_repo(repository, private=True, exist_ok=True)
        # An earlier model may have had another number of shards, of which none may stay.
        stale = ["*.safetensors", "*.safetensors.index.json"]
        upload_folder(repo_id=repository, folder_path=directory, delete_patterns=stale)
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[-1]
        raise DirlError(
            f"the model is safe in {directory}, but not on the Hub ({reason}):"
            f" push it later with `hf upload {repository} {directory} --private`"
        ) from error
    return str(address)
