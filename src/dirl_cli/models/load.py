"""Models on disk: loading and saving in the published layout, with everything a sampler or trainer asks of one."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dirl_cli.errors import DirlError
from dirl_cli.models.adapter import merge_adapter
from dirl_cli.models.model_directory import ModelDirectory
from dirl_cli.models.save import save_published
from dirl_cli.ranges import ATTENTIONS, DEVICES, DTYPES, Count, Natural
from dirl_cli.types import Decoding

DEFAULT_BLOCK_SIZE = 4  # published configurations may name neither
DEFAULT_MASK_TOKEN_ID = 151669
MASK_NAMES = ("<|MASK|>", "<MASK>", "<|mask|>", "<mask>")  # a tokenizer's files may hold more than one


@dataclass(frozen=True)
class DiffusionLM:
    """A block-diffusion language model: a transformers decoder, its tokenizer and what the method needs to know.

    unsampled_ids: ids that stand for no text (the mask token, the embedding's padding) and are never sampled.
    stop_token_ids: ids that end an answer. logit_shift: whether a token is predicted where the one before it stands,
    as causal models do, and not in its own place.
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
    def vocab_size(self) -> int:
        """The tokens that have a row in the embedding; a tokenizer may know fewer."""
        return self.model.config.vocab_size

    @property
    def max_length(self) -> int:
        """The most positions the model was made for, prompt and answer together."""
        return self.model.config.max_position_embeddings

    @property
    def longest_prompt(self) -> int:
        """The most tokens a prompt may have that is to be answered."""
        return self.max_length // self.block_size * self.block_size - 1

    @property
    def logit_shift(self) -> bool:
        return is_shifted(self.model)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise DirlError(f"{self.model.name_or_path} has no tokenizer: copy its tokenizer files beside config.json")
        return self.tokenizer

    def decoding(self, asked: Decoding) -> Decoding:
        """The decoding that is asked for, with what it leaves to the model."""
        steps, stops = asked.denoising_steps or self.block_size, asked.stop_token_ids or self.stop_token_ids
        return replace(asked, denoising_steps=steps, stop_token_ids=stops)

    def save(self, directory: Path, card: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Make a directory in the published layout, whole or not at all, with `card` as its README.md."""
        save_published(directory, self.model, self.tokenizer, card, state_dict)


@dataclass(frozen=True)
class PretrainedModel:
    """A model directory, or a Hub repository that was downloaded before.

    block_size: None for the checkpoint's own; another is for `dirl sft` and `dirl rl` to teach it. adapter: what to
    merge into the model. made_by: the command that leaves it where it is, for one that nobody can download.
    """

    name: str
    path: str
    block_size: Count | None = None
    mask_token_id: Natural | None = None
    adapter: str | None = None
    made_by: str | None = None

    def load(self, dtype: str = "auto", device: str = "auto", attention: str = "auto") -> DiffusionLM:
        """Load the model for `device`, in evaluation mode.

        dtype: float32, bfloat16, or auto for bfloat16 on a GPU. attention: sdpa, flex, or auto for the device's best.
        device: as torch's; on `meta` the model has shapes but no weights.
        Raises DirlError where the directory, a tensor, the tokenizer or the adapter is missing or damaged.
        """
        device = pick_device(device)
        attention = pick_attention(attention, device)
        if self.made_by and not Path(self.path).is_dir():
            raise DirlError(f"{self.path} is not there: run `{self.made_by}` first")
        stored = ModelDirectory(self.path)
        directory = stored.directory()
        config = stored.config(directory, attention)
        if device == "meta":
            return self.outline(config, stored.tokenizer(directory))
        block_size, mask_id = self.block_and_mask(config)
        model = stored.model(directory, config, pick_dtype(dtype, device))
        model = merge_adapter(model, self.adapter) if self.adapter else model
        torch.nn.Module.to(model, device).eval()
        require_finite(model)
        return diffusion_lm(model, stored.tokenizer(directory), block_size, mask_id)

    def outline(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> DiffusionLM:
        """The model on `meta`, its shapes alone: no weight is read."""
        block_size, mask_id = self.block_and_mask(config)
        model = ModelDirectory(self.path).shapes(config, torch.float32)
        return diffusion_lm(model.eval(), tokenizer, block_size, mask_id)

    def block_and_mask(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Block size and id of the mask token: as asked, as stored, or as published ones are."""
        block_size = first_set(self.block_size, getattr(config, "block_size", None), DEFAULT_BLOCK_SIZE)
        stored_mask = getattr(config, "mask_token_id", None)
        mask_id = first_set(self.mask_token_id, stored_mask, DEFAULT_MASK_TOKEN_ID)
        if stored_mask not in (None, mask_id):
            raise DirlError(
                f"model.mask_token_id is {mask_id} and the checkpoint's is {stored_mask}: leave model.mask_token_id out"
            )
        if mask_id >= config.vocab_size:
            raise DirlError(
                f"mask token {mask_id} is outside the vocabulary of {self.path} ({config.vocab_size}):"
                " set model.mask_token_id"
            )
        return block_size, mask_id


def diffusion_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, block_size: int, mask_token_id: int
) -> DiffusionLM:
    """Gather what the method needs to know about a loaded model, and note it in the configuration that is saved."""
    if block_size < 1:
        raise DirlError(f"block_size is {block_size}: it must be at least 1")
    learn_padding(model)
    model.config.block_size, model.config.mask_token_id = block_size, mask_token_id
    eos = [model.generation_config.eos_token_id, model.config.eos_token_id]
    ends = [i for ids in eos if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    if not all(type(i) is int for i in ends):
        raise DirlError(f"{model.name_or_path} ends answers with {ends} (eos_token_id): give numbers of tokens")
    stops = set(ends)
    vocabulary: dict[str, int] = tokenizer.get_vocab() if tokenizer else {}
    require_rows(model, vocabulary)
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


def learn_padding(model: PreTrainedModel) -> None:
    """Let the pad token's embedding learn as any other's.

    In blocks it is context and is predicted, and it may be the stop token too; where a configuration names it,
    transformers has the embedding drop its gradient.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def require_rows(model: PreTrainedModel, vocabulary: Mapping[str, int]) -> None:
    """Raises DirlError for a token that has no row in the embedding, which whoever meets it would look up in vain."""
    word = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if word is not None and vocabulary[word] >= model.config.vocab_size:
        raise DirlError(
            f"the tokenizer of {model.name_or_path} knows {word!r} as token {vocabulary[word]}, and the model has"
            f" {model.config.vocab_size}: resize its embedding, or take that out of the tokenizer's files"
        )


def require_finite(model: PreTrainedModel) -> None:
    """Raises DirlError for a weight that holds what is no number, since all that such a model says is noise."""
    for name, weight in model.named_parameters():
        if not weight.detach().sum(dtype=torch.float32).isfinite():  # which one that is not finite makes so
            raise DirlError(f"{model.name_or_path} holds nan or inf in {name}: download, copy or train it again")


def is_shifted(model: PreTrainedModel) -> bool:
    """Whether a model predicts a token where the one before it stands; published configurations do not tell."""
    return getattr(model.config, "logit_shift", False)


def fingerprint(model: PreTrainedModel) -> str:
    """A fingerprint of the weights from some of the values of each, as quick for a large model as for a small one."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.flatten()
        found.update(name.encode() + values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    return found.hexdigest()


def first_set(*values: int | None) -> int:
    """The first of some values that is there."""
    return next(value for value in values if value is not None)


def pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise DirlError(f"device={device}: {DEVICES.hint(device)}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise DirlError(f"device={device}: there is no CUDA device here, so leave it at auto")
    return device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype)
    if found is None:
        raise DirlError(f"dtype={dtype}: {DTYPES.hint(dtype)}")
    return found


def pick_attention(attention: str, device: str) -> str:
    """FlexAttention has no backward on a CPU; there and in tests a dense mask serves."""
    if attention == "auto":
        attention = "flex" if device.startswith("cuda") else "sdpa"
    found = {"flex": "flex_attention", "sdpa": "sdpa"}.get(attention)
    if found is None:
        raise DirlError(f"attention={attention}: {ATTENTIONS.hint(attention)}")
    return found
