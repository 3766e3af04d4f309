"""The shapes of published checkpoints, so that the memory of a run can be planned before anything is downloaded."""

from typing import Any

from dirl_cli import hub
from dirl_cli.errors import NotHere
from dirl_cli.models.load import DiffusionLM, PretrainedModel, pick_attention
from dirl_cli.models.model_directory import ModelDirectory
from dirl_cli.models.peft import ModelSource
from dirl_cli.models.safe_files import check_safe_checkpoint
from dirl_cli.models.sdar import SDARConfig, SDARMoeConfig

COMMON = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "mask_token_id": 151669,
    "eos_token_id": 151643,
    "pad_token_id": None,
}
ONE = {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144}
FOUR = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728}
EIGHT = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288}
THIRTY = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
PUBLISHED = {
    "JetLM/SDAR-1.7B-Chat": ONE,
    "JetLM/SDAR-4B-Chat": FOUR,
    "JetLM/SDAR-8B-Chat": EIGHT,
    "JetLM/SDAR-30B-A3B-Chat": THIRTY,
    "Gen-Verse/TraDo-4B-Instruct": FOUR,
    "Gen-Verse/TraDo-8B-Instruct": EIGHT,
    "Gen-Verse/TraDo-8B-Thinking": EIGHT,
    "OpenMOSS-Team/DiRL-8B-Instruct": EIGHT,
}


def shapes(model: ModelSource, attention: str) -> DiffusionLM:
    """A model without its weights, for what is to be done with them later; all of it has to be on this machine."""
    return model.load("float32", "meta", attention)


def outline(model: ModelSource, attention: str) -> DiffusionLM:
    """A model without its weights, from as little of it as there is on this machine.

    Of a model of the Hub that is not here, or only in part, its config.json is enough, and of those in PUBLISHED not
    even that; then it has no tokenizer. Raises DirlError as `load` does where there is neither.
    """
    try:
        return shapes(model, attention)
    except NotHere:
        if not isinstance(model, PretrainedModel):
            raise
        stored = ModelDirectory(model.path)
        directory = hub.with_config(model.path)
        if directory is not None:
            check_safe_checkpoint(directory)
            tokenizer = stored.tokenizer(directory)
            return model.outline(stored.config(directory, pick_attention(attention, "meta")), tokenizer)
        if model.path not in PUBLISHED:
            raise
        shape: Any = COMMON | PUBLISHED[model.path]
        config = SDARMoeConfig(**shape) if "num_experts" in shape else SDARConfig(**shape)
        config._attn_implementation = pick_attention(attention, "meta")
        return model.outline(config, None)
