"""Models on disk: loading and saving in the published layout, with everything a sampler or trainer asks of one."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dirl_cli.errors import DirlError
from dirl_cli.models.adapter import merge_adapter
from dirl_cli.models.attention_cpu import TILES
from dirl_cli.models.experts import choose_experts
from dirl_cli.models.model_directory import ModelDirectory
from dirl_cli.models.save import save_published
from dirl_cli.models.sharded_tensors import full_tensor
from dirl_cli.ranges import ATTENTIONS, DEVICES, DTYPES, Count, Natural
from dirl_cli.types import Decoding

LEAST_HEAD = 16  # values of an attention head that FlexAttention computes on a GPU
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
        """The tokenizer. Raises DirlError for a model without one."""
        if self.tokenizer is None:
            raise DirlError(f"{self.model.name_or_path} has no tokenizer: copy its tokenizer files beside config.json")
        return self.tokenizer

    def decoding(self, options: Decoding) -> Decoding:
        """The same options; a block's denoising steps default to its tokens, and stop tokens to the model's."""
        return replace(
            options,
            denoising_steps=options.denoising_steps or self.block_size,
            stop_token_ids=options.stop_token_ids or self.stop_token_ids,
        )

    def save(self, directory: Path, card: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Make a directory in the published layout, whole or not at all, with `card` as its README.md."""
        save_published(directory, self.model, self.tokenizer, card, state_dict)


@dataclass(frozen=True)
class SavedModel:
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

        dtype: float32, bfloat16, or auto for bfloat16 on a GPU. device: cpu, cuda, or auto for a GPU where there is
        one; on `meta` the model has shapes but no weights. attention: sdpa, flex, or auto for flex on a GPU.
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

        # Before the weights, so that what is wrong with it is told in a moment.
        block_size, mask_id = self.block_and_mask(config)
        config._attn_implementation = fitting_attention(config, attention, device)
        model = stored.model(directory, config, pick_dtype(dtype, device))
        if self.adapter:
            model = merge_adapter(model, self.adapter)
        torch.nn.Module.to(model, device).eval()
        choose_experts(model)
        require_finite(model)
        return diffusion_lm(model, stored.tokenizer(directory), block_size, mask_id)

    def outline(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> DiffusionLM:
        """The model on `meta`, its shapes alone: no weight is read."""
        block_size, mask_id = self.block_and_mask(config)
        model = ModelDirectory(self.path).shapes(config, torch.float32)
        return diffusion_lm(model.eval(), tokenizer, block_size, mask_id)

    def block_and_mask(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Block size and id of the mask token: as asked, as stored, or as published ones are.

        Raises DirlError for a mask token that is not the model's, or outside of its vocabulary.
        """
        # Another block size can be learned, another mask token cannot: its embedding is what all was learned with.
        block_size = first_set(self.block_size, getattr(config, "block_size", None), DEFAULT_BLOCK_SIZE)
        stored_mask = getattr(config, "mask_token_id", None)
        mask_id = first_set(self.mask_token_id, stored_mask, DEFAULT_MASK_TOKEN_ID)
        if stored_mask not in (None, mask_id):
            raise DirlError(
                f"model.mask_token_id is {mask_id} and the checkpoint's is {stored_mask}: leave model.mask_token_id out"
            )
        if mask_id >= config.vocab_size and self.mask_token_id is None and stored_mask is None:
            raise DirlError(
                f"{self.path} names no mask token, and its vocabulary of {config.vocab_size} has no {mask_id}: a causal"
                f" model learns to write blocks first, by `dirl sft model=from_causal model.path={self.path}`, and of"
                " another the mask token is given as model.mask_token_id"
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
    """Gather what the method needs to know about a loaded model, and note it in the configuration that is saved.

    Raises DirlError for a block size below 1, stop tokens that are no numbers, or a token without an embedding.
    """
    if block_size < 1:
        raise DirlError(f"block_size is {block_size}: it must be at least 1")
    learn_padding(model)
    model.config.block_size = block_size
    model.config.mask_token_id = mask_token_id

    # The end of a turn ends an answer too, also where a chat model's configurations do not say so.
    stops = end_tokens(model)
    vocabulary: dict[str, int] = {}
    pad = model.config.pad_token_id
    if tokenizer:
        vocabulary = tokenizer.get_vocab()
        pad = tokenizer.pad_token_id
        stops |= {tokenizer.eos_token_id, vocabulary.get("<|im_end|>")} - {None}
    require_rows(model, vocabulary)
    if pad is None:
        pad = min(stops, default=0)

    # What may be sampled: not mask tokens, under any name, nor rows of the embedding that stand for no token.
    ids = range(model.config.vocab_size)
    text = set(vocabulary.values() or ids) - {mask_token_id, *map(vocabulary.get, MASK_NAMES)}
    vars(model.generation_config).update(
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        block_size=block_size,
        mask_token_id=mask_token_id,
        _from_model_config=None,  # else saving would drop what it holds beyond the model's configuration
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


def in_blocks_of(lm: DiffusionLM, block_size: int) -> DiffusionLM:
    """The same model in blocks of another size, which its configurations say from now on."""
    lm.model.config.block_size = block_size
    vars(lm.model.generation_config).update(block_size=block_size)
    return replace(lm, block_size=block_size)


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The ids that a model's configurations end an answer with. Raises DirlError where they are no numbers."""
    ends: list[Any] = []
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id):
        if isinstance(ids, list):
            ends += ids
        elif ids is not None:
            ends.append(ids)
    if not all(type(i) is int for i in ends):
        raise DirlError(f"{model.name_or_path} ends answers with {ends} (eos_token_id): give numbers of tokens")
    return set(ends)


def learn_padding(model: PreTrainedModel) -> None:
    """Let the pad token's embedding learn as any other's.

    In blocks it is context and is predicted, and it may be the stop token too; where a configuration names it,
    transformers has the embedding drop its gradient.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def require_rows(model: PreTrainedModel, vocabulary: Mapping[str, int]) -> None:
    """Raises DirlError for a token of the tokenizer that has no row in the embedding. vocabulary: ids by token."""
    word = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if word is not None and vocabulary[word] >= model.config.vocab_size:
        raise DirlError(
            f"the tokenizer of {model.name_or_path} knows {word!r} as token {vocabulary[word]}, and the model has"
            f" {model.config.vocab_size}: resize its embedding, or take that out of the tokenizer's files"
        )


def require_finite(model: PreTrainedModel) -> None:
    """Raises DirlError for a weight that holds nan or inf, since all that such a model says is noise."""
    for name, weight in model.named_parameters():
        # A sum is finite only if each of its terms is, and it takes no mask of the weight's size.
        if not weight.detach().sum(dtype=torch.float32).isfinite():
            raise DirlError(f"{model.name_or_path} holds nan or inf in {name}: download, copy or train it again")


def is_shifted(model: PreTrainedModel) -> bool:
    """Whether a model predicts a token where the one before it stands; published configurations do not tell."""
    return getattr(model.config, "logit_shift", False)


def fingerprint(model: PreTrainedModel) -> str:
    """A fingerprint of the weights from some 64 values of each, as quick for a large model as for a small one."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        values = full_tensor(tensor.detach()).flatten()
        sample = values[:: max(1, len(values) // 64)]
        digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def first_set(*values: int | None) -> int:
    """The first of some values that is not None."""
    return next(value for value in values if value is not None)


def pick_device(device: str) -> str:
    """The device that a setting names, auto for a GPU where there is one. Raises DirlError for what is not here."""
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
    """The dtype that a setting names, auto for bfloat16 on a GPU. Raises DirlError for a name that is none."""
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    by_name = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in by_name:
        raise DirlError(f"dtype={dtype}: {DTYPES.hint(dtype)}")
    return by_name[dtype]


def pick_attention(attention: str, device: str) -> str:
    """The transformers name of the attention that a setting names. Raises DirlError for a name that is none.

    auto: FlexAttention on a GPU, and tiles elsewhere.
    """
    is_gpu = device.startswith("cuda")
    if attention == "auto":
        attention = "flex" if is_gpu else "tiles"
    by_name = {"flex": "flex_attention", "sdpa": "sdpa", "tiles": TILES}
    if attention not in by_name:
        raise DirlError(f"attention={attention}: {ATTENTIONS.hint(attention)}")
    if attention == "tiles" and is_gpu:
        raise DirlError("attention=tiles is for a CPU: leave it at auto")
    return by_name[attention]


def fitting_attention(config: PreTrainedConfig, attention: str, device: str) -> str:
    """The attention of a model as it is loaded: `attention`, or SDPA where a GPU's FlexAttention wants larger heads.

    attention: transformers' name.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if attention == "flex_attention" and device.startswith("cuda") and size < LEAST_HEAD:
        return "sdpa"
    return attention
