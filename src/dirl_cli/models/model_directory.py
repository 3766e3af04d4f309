"""A model's configuration, weights and tokenizer on the disk; what may be wrong with them is told in a sentence."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import dirl_cli.models.sdar  # noqa: F401  # registers `sdar` and `sdar_moe`
from dirl_cli import hub
from dirl_cli.errors import DirlError
from dirl_cli.models.safe_files import check_safe_checkpoint, read_object
from dirl_cli.text import counted

UNBUILDABLE = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, ImportError, RuntimeError)


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory, or a Hub repository that was downloaded before. path: of the one, or the other's name.

    Methods raise DirlError for what is missing, damaged or does not fit the rest.
    """

    path: str

    def directory(self) -> Path:
        """Where it is. Raises DirlError where that is nowhere, or where it holds what is never loaded."""
        directory = self._locate()
        check_safe_checkpoint(directory)
        return directory

    def _locate(self) -> Path:
        path = Path(self.path)
        if path.is_dir():
            return path
        if path.exists() or self.path.startswith((".", "/", "~")) or self.path.count("/") != 1:
            raise DirlError(
                f"{self.path} is not a directory: give model.path that of a saved model, such as `dirl sft` leaves"
            )
        return hub.local_snapshot(self.path, "model")

    def config(self, directory: Path, attention: str) -> PreTrainedConfig:
        """Read the configuration. attention: the implementation that its model is to use, by transformers' name."""
        if not (directory / "config.json").exists():
            raise DirlError(
                f"{self.path} holds no config.json, so it is no saved model: give one as `dirl sft` leaves it"
            )
        if not read_object(directory / "config.json").get("model_type"):
            raise DirlError(f"{self.path}/config.json names no model_type, such as sdar: download or copy it again")
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            # Whatever it names instead: it may name a repository of the Hub, whose code transformers would run.
            config._attn_implementation = attention
            config._experts_implementation = None
        except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
            raise self._unloadable(error) from error
        return config

    def shapes(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Make the model on `meta`: shapes without weights."""
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=dtype)
        except UNBUILDABLE as error:
            raise self._unbuildable(error) from error

    def model(self, directory: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Load the weights onto the CPU, as `dtype`."""
        # What is missing, left over or of another shape is told by `_require_complete` in a sentence, and by
        # transformers in a page.
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (SafetensorError, json.JSONDecodeError) as error:
            raise DirlError(f"{self.path} holds a damaged weight file ({error}): download or copy it again") from error
        except (OSError, ValueError) as error:
            raise self._unloadable(error) from error
        except UNBUILDABLE as error:
            raise self._unbuildable(error) from error
        model, loading_info = loaded
        self._require_complete(loading_info)
        return cast(PreTrainedModel, model)

    def _require_complete(self, loading_info: dict[str, Any]) -> None:
        """Raises DirlError where files and configuration differ. loading_info: what transformers reports of it."""
        # transformers only warns, and fills what it lacks with random numbers.
        mismatched = sorted(loading_info["mismatched_keys"])
        if mismatched:
            name, shape, expected_shape = mismatched[0]
            raise DirlError(
                f"{self.path} holds {name} with shape {tuple(shape)}, and its config.json asks for"
                f" {tuple(expected_shape)}: download or copy it again"
            )
        if missing := sorted(loading_info["missing_keys"]):
            raise DirlError(
                f"{self.path} lacks {counted(len(missing), 'tensor')} of the model, such as {missing[0]}:"
                " download or copy it again"
            )
        if unexpected := sorted(loading_info["unexpected_keys"]):
            raise DirlError(
                f"{self.path} holds {counted(len(unexpected), 'tensor')} that its config.json does not know,"
                f" such as {unexpected[0]}: download or copy config.json again"
            )

    def tokenizer(self, directory: Path) -> PreTrainedTokenizerBase | None:
        """Read the tokenizer; None where there is no file of one."""
        if not list(directory.glob("*token*")):
            return None
        try:
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of the tokenizers library, which raises nothing more specific
            reason = one_line(error)
            raise DirlError(f"the tokenizer of {self.path} cannot be read ({reason}): copy it again") from error

    def _unbuildable(self, error: Exception) -> DirlError:
        reason = one_line(error)
        return DirlError(
            f"{self.path} cannot be loaded as its config.json and index say ({reason}): download or copy it again"
        )

    def _unloadable(self, error: Exception) -> DirlError:
        reason = one_line(error)
        return DirlError(f"{self.path} is not a model that can be loaded ({reason}): give another, or copy it again")


def one_line(error: Exception) -> str:
    """The first line of what transformers complains of, in our words where its own do not help."""
    if "custom code" in str(error):
        return "it needs code of its own, which is never run"
    if "conversion of the weights" in str(error):
        return "the experts of a layer are incomplete or differ in shape"
    return str(error).strip().split("\n")[0].rstrip(" :")
