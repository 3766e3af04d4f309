"""Models on disk: loading and saving in the published layout, with everything a sampler or trainer asks of one."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
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
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.models.adapter import merged
from dirl_cli.models.harmless import require_harmless
from dirl_cli.models.published import save_published

DEFAULT_BLOCK_SIZE = 4  # published configurations may name neither
DEFAULT_MASK_TOKEN_ID = 151669
UNBUILDABLE = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, ImportError, RuntimeError)
MASK_NAMES = ("<|MASK|>", "<MASK>", "<|mask|>", "<mask>")  # a tokenizer's files may hold more than one


@dataclass(frozen=True)
class DiffusionLM:
    """A block-diffusion language model: a transformers decoder, its tokenizer and what the method needs to know.

    unsampled_ids: ids that stand for no text (the mask token, the embedding's padding) and are never sampled.
    stop_token_ids: ids that end an answer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    block_size: int
    mask_token_id: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    unsampled_ids: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_length(self) -> int:
        """The most positions the model was made for, prompt and answer together."""
        return self.model.config.max_position_embeddings

    @property
    def longest_prompt(self) -> int:
        """The most tokens a prompt may have that is to be answered."""
        return self.max_length // self.block_size * self.block_size - 1

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise DirlError(f"{self.model.name_or_path} has no tokenizer: copy its tokenizer files beside config.json")
        return self.tokenizer

    def save(self, directory: Path, card: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Make a directory in the published layout, whole or not at all, with `card` as its README.md."""
        save_published(directory, self.model, self.tokenizer, card, state_dict)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, or a Hub repository that was downloaded before; `adapter`: what to merge into it."""

    name: str
    path: str
    block_size: int | None = None
    mask_token_id: int | None = None
    adapter: str | None = None

    def load(self, dtype: str = "auto", device: str = "auto", attention: str = "auto") -> DiffusionLM:
        """Load the model for `device`, in evaluation mode.

        dtype: float32, bfloat16, or auto for bfloat16 on a GPU. attention: sdpa, flex, or auto for the device's best.
        device: as torch's; on `meta` the model has shapes but no weights.
        Raises DirlError where the directory, a tensor, the tokenizer or the adapter is missing or damaged.
        """
        device = pick_device(device)
        attention = pick_attention(attention, device)
        directory = self._directory()
        require_harmless(directory)
        config = self._config(directory, attention)
        block_size = agree("block_size", self.block_size, getattr(config, "block_size", None), DEFAULT_BLOCK_SIZE)
        mask_id = agree(
            "mask_token_id", self.mask_token_id, getattr(config, "mask_token_id", None), DEFAULT_MASK_TOKEN_ID
        )
        if mask_id >= config.vocab_size:
            raise DirlError(
                f"mask token {mask_id} is outside the vocabulary of {self.path} ({config.vocab_size}):"
                " set model.mask_token_id"
            )
        if device == "meta":  # its shapes alone: no weight is read
            model = self._shapes(config, pick_dtype(dtype, device))
            return diffusion_lm(model.eval(), self._tokenizer(directory), block_size, mask_id)
        model = self._model(directory, config, pick_dtype(dtype, device))
        model = merged(model, self.adapter) if self.adapter else model
        torch.nn.Module.to(model, device).eval()
        return diffusion_lm(model, self._tokenizer(directory), block_size, mask_id)

    def _directory(self) -> Path:
        path = Path(self.path)
        if path.is_dir():
            return path
        if path.exists() or self.path.startswith((".", "/", "~")) or self.path.count("/") != 1:
            raise DirlError(
                f"{self.path} is not a directory: give model.path that of a saved model, such as `dirl sft` leaves"
            )
        return hub.local(self.path, "model")

    def _config(self, directory: Path, attention: str) -> PreTrainedConfig:
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            # Whatever it names instead: it may name a repository of the Hub, whose code transformers would run.
            config._attn_implementation, config._experts_implementation = attention, None
        except (OSError, ValueError, TypeError, StrictDataclassError) as error:
            raise self._unloadable(error) from error
        return config

    def _shapes(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=dtype)
        except UNBUILDABLE as error:
            raise self._unbuildable(error) from error

    def _model(self, directory: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # its report of what is missing says in a page what follows below
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below
            )
        except (SafetensorError, json.JSONDecodeError) as error:
            raise DirlError(f"{self.path} holds a damaged weight file ({error}): download or copy it again") from error
        except (OSError, ValueError) as error:
            raise self._unloadable(error) from error
        except UNBUILDABLE as error:
            raise self._unbuildable(error) from error
        model, found = loaded
        for key, stored, wanted in sorted(found["mismatched_keys"])[:1]:
            raise DirlError(
                f"{self.path} holds {key} with shape {tuple(stored)}, and its config.json asks for {tuple(wanted)}:"
                " download or copy it again"
            )
        if wrong := sorted(found["missing_keys"]):
            raise DirlError(
                f"{self.path} lacks {len(wrong)} tensor{'s' * (len(wrong) > 1)} of the model, such as {wrong[0]}:"
                " download or copy it again"
            )
        if strange := sorted(found["unexpected_keys"]):
            raise DirlError(
                f"{self.path} holds {len(strange)} tensor{'s' * (len(strange) > 1)} that its config.json does not know,"
                f" such as {strange[0]}: download or copy config.json again"
            )
        return cast(PreTrainedModel, model)

    def _tokenizer(self, directory: Path) -> PreTrainedTokenizerBase | None:
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
        return DirlError(f"{self.path} is not a model that can be loaded: {one_line(error)}")


def diffusion_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, block_size: int, mask_token_id: int
) -> DiffusionLM:
    """Gather what the method needs to know about a loaded model, and note it in the configuration that is saved."""
    if block_size < 1:
        raise DirlError(f"block_size is {block_size}: it must be at least 1")
    model.config.block_size, model.config.mask_token_id = block_size, mask_token_id
    eos = [model.generation_config.eos_token_id, model.config.eos_token_id]
    ends = [i for ids in eos if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    if not all(type(i) is int for i in ends):
        raise DirlError(f"{model.name_or_path} ends answers with {ends} (eos_token_id): give numbers of tokens")
    stops = set(ends)
    vocabulary: dict[str, int] = tokenizer.get_vocab() if tokenizer else {}
    if tokenizer:
        stops |= {tokenizer.eos_token_id, vocabulary.get("<|im_end|>")} - {None}
    pad = tokenizer.pad_token_id if tokenizer else model.config.pad_token_id
    pad = min(stops, default=0) if pad is None else pad
    ids = range(model.config.vocab_size)
    text = set(vocabulary.values() or ids) - {mask_token_id, *map(vocabulary.get, MASK_NAMES)}
    vars(model.generation_config).update(
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        block_size=block_size,
        mask_token_id=mask_token_id,
        _from_model_config=None,  # what it knows beyond the model's configuration is kept
    )
    return DiffusionLM(
        model=model,
        tokenizer=tokenizer,
        block_size=block_size,
        mask_token_id=mask_token_id,
        pad_token_id=pad,
        stop_token_ids=tuple(sorted(stops)),
        unsampled_ids=tuple(i for i in ids if i not in text),
    )


def fingerprint(model: PreTrainedModel) -> str:
    """A fingerprint of the weights from some of the values of each, as quick for a large model as for a small one."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.flatten()
        found.update(name.encode() + values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    return found.hexdigest()


def agree(what: str, asked: int | None, stored: int | None, default: int) -> int:
    """The one value of a setting that both the configuration and the checkpoint may name."""
    if asked is not None and stored is not None and asked != stored:
        raise DirlError(f"{what} is {asked} in the configuration and {stored} in the checkpoint: leave one of them out")
    return next(value for value in (asked, stored, default) if value is not None)


def pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise DirlError(f"device={device}: {did_you_mean(device, ('auto', 'cpu', 'cuda'))}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise DirlError(f"device={device}: there is no CUDA device here, so leave it at auto")
    return device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype)
    if found is None:
        raise DirlError(f"dtype={dtype}: {did_you_mean(dtype, ('auto', 'float32', 'bfloat16'))}")
    return found


def pick_attention(attention: str, device: str) -> str:
    """FlexAttention has no backward on a CPU; there and in tests a dense mask serves."""
    if attention == "auto":
        attention = "flex" if device.startswith("cuda") else "sdpa"
    found = {"flex": "flex_attention", "sdpa": "sdpa"}.get(attention)
    if found is None:
        raise DirlError(f"attention={attention}: {did_you_mean(attention, ('auto', 'sdpa', 'flex'))}")
    return found


def one_line(error: Exception) -> str:
    """What transformers complains of, in fewer words."""
    if "custom code" in str(error):
        return "it needs code of its own, which is never run"
    if "conversion of the weights" in str(error):
        return "the experts of a layer are incomplete or differ in shape"
    return str(error).strip().split("\n")[0].rstrip(" :")
