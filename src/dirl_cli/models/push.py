"""A saved model on the Hub."""

from pathlib import Path

import httpx
from huggingface_hub import create_repo, get_token, upload_folder
from huggingface_hub.utils import validate_repo_id

from dirl_cli.errors import DirlError


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

    Raises DirlError that says how to push it later.
    """
    try:
        address = create_repo(repository, private=True, exist_ok=True)
        weights = ["*.safetensors", "*.safetensors.index.json"]  # of another number of shards
        upload_folder(repo_id=repository, folder_path=directory, delete_patterns=weights)
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[-1]
        raise DirlError(
            f"the model is safe in {directory}, but not on the Hub ({reason}):"
            f" push it later with `hf upload {repository} {directory} --private`"
        ) from error
    return str(address)
