"""What a checkpoint may not bring: pickles, code, and paths that lead out of its directory."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from dirl_cli.errors import DirlError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FOREIGN = {"quantization_config": "is quantised", "transformers_weights": "keeps its weights under another name"}


def check_safe_checkpoint(directory: Path) -> None:
    """Raises DirlError for a model directory that is more than JSON and safetensors which stay inside it."""
    config = read_object(directory / "config.json")
    for key, complaint in FOREIGN.items():
        if config.get(key):
            raise DirlError(f"{directory} {complaint} ({key} in config.json): give the checkpoint as it was published")
    if (directory / "adapter_config.json").exists():
        raise DirlError(f"{directory} holds an adapter too: move adapter_config.json away, or give model.adapter=DIR")

    # Pickles beside safetensors are left alone, since transformers is told to take safetensors.
    if not (directory / WEIGHTS).exists() and not (directory / INDEX).exists():
        pickles = list(chain.from_iterable(directory.glob(pattern) for pattern in PICKLES))
        if pickles:
            raise DirlError(
                f"{directory} holds its weights in {pickles[0].name}, a pickle, which may hold code and is never"
                " loaded: save it elsewhere as safetensors"
            )

    # A name with a directory in it would be loaded from outside, and one of another kind may be a pickle.
    for file, name in referenced_files(directory):
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in (".safetensors", ".json"):
            raise DirlError(f"{directory / file} names {name!r}, which is no safetensors or JSON file beside it")


def referenced_files(directory: Path) -> Iterator[tuple[str, Any]]:
    """Pairs of a file in a model directory and a name in it, of a file that transformers would load because of it."""
    shards = read_object(directory / INDEX).get("weight_map")
    if isinstance(shards, dict):
        for name in shards.values():
            yield INDEX, name
    versions = read_object(directory / "tokenizer_config.json").get("fast_tokenizer_files")
    if isinstance(versions, list):
        for name in versions:
            yield "tokenizer_config.json", name


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
