"""What a checkpoint may not bring: pickles, code, and paths that lead out of its directory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dirl_cli.errors import DirlError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FOREIGN = {"quantization_config": "is quantised", "transformers_weights": "keeps its weights under another name"}


def check_safe_checkpoint(directory: Path) -> None:
    """Raises DirlError for a model directory that is more than JSON and safetensors which stay inside it."""
    config = read_object(directory / "config.json")
    for key in filter(config.get, FOREIGN):
        raise DirlError(f"{directory} {FOREIGN[key]} ({key} in config.json): give the checkpoint as it was published")
    if (directory / "adapter_config.json").exists():
        raise DirlError(f"{directory} holds an adapter too: move adapter_config.json away, or give model.adapter=DIR")
    if not (directory / WEIGHTS).exists() and not (directory / INDEX).exists():
        for pickle in (file for pattern in PICKLES for file in directory.glob(pattern)):
            raise DirlError(
                f"{directory} holds its weights in {pickle.name}, a pickle, which may hold code and is never loaded:"
                " save it elsewhere as safetensors"
            )
    for file, name in referenced_files(directory):
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in (".safetensors", ".json"):
            raise DirlError(f"{directory / file} names {name!r}, which is no safetensors or JSON file beside it")


def referenced_files(directory: Path) -> Iterator[tuple[str, Any]]:
    """The files that others in a model directory send transformers to, with those others."""
    shards = read_object(directory / INDEX).get("weight_map")
    yield from ((INDEX, name) for name in (shards.values() if isinstance(shards, dict) else ()))
    versions = read_object(directory / "tokenizer_config.json").get("fast_tokenizer_files")
    yield from (("tokenizer_config.json", name) for name in (versions if isinstance(versions, list) else ()))


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise DirlError(f"{file} is damaged ({error}): download or copy it again") from error
    if not isinstance(content, dict):
        raise DirlError(f"{file} is damaged (it is no JSON object): download or copy it again")
    return content
