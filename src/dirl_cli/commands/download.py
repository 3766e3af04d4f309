"""`dirl download`: fetch from the Hub, into its cache or a directory, the files of a model that are not there yet."""

from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from omegaconf import DictConfig

from dirl_cli.errors import DirlError

# Weights, configuration and tokenizer; not the repository's code, pictures or copies in other formats.
FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def run(cfg: DictConfig, out: Path | None) -> None:
    """Download `cfg.model` into `cfg.to`, or into the Hub's cache, and print where it is."""
    if "path" not in cfg.model:
        raise DirlError(f"model={cfg.model.name} is made on the spot: there is nothing to download")
    if Path(cfg.model.path).is_dir():
        raise DirlError(f"{cfg.model.path} is a directory here: there is nothing to download")
    print(fetch(cfg.model.path, Path(cfg.to) if cfg.to else None))


def fetch(repository: str, to: Path | None) -> Path:
    """Download what a model needs from a Hub repository and return the directory that holds it."""
    try:
        return Path(snapshot_download(repository, local_dir=to, allow_patterns=list(FILES)))
    except HFValidationError as error:
        raise DirlError(f"{repository} is neither a directory nor a name on the Hub (OWNER/NAME)") from error
    except GatedRepoError as error:
        raise DirlError(
            f"{repository} is gated: accept its terms on its page, then `hf auth login` and try again"
        ) from error
    except RepositoryNotFoundError as error:
        raise DirlError(f"the Hub has no {repository}, or it is private: check the name or `hf auth login`") from error
    except HfHubHTTPError as error:
        raise DirlError(f"the Hub refused {repository} ({error}): try again later") from error
    except (httpx.TransportError, LocalEntryNotFoundError, ConnectionError) as error:
        raise DirlError(f"the Hub cannot be reached for {repository}: check the network, then try again") from error
    except OSError as error:
        raise DirlError(f"{repository} cannot be written ({error}): make room, or give a directory with to=") from error
