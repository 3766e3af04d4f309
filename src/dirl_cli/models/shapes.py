"""The shapes of published checkpoints, so that the memory of a run can be planned before anything is downloaded."""

from typing import Any

from dirl_cli import hub
from dirl_cli.errors import NotDownloaded
from dirl_cli.models.load import DiffusionLM, SavedModel, pick_attention
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
SDAR_1_7B = {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144}
SDAR_4B = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728}
SDAR_8B = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288}
SDAR_30B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
PUBLISHED = {
    "JetLM/SDAR-1.7B-Chat": SDAR_1_7B,
    "JetLM/SDAR-4B-Chat": SDAR_4B,
    "JetLM/SDAR-8B-Chat": SDAR_8B,
    "JetLM/SDAR-30B-A3B-Chat": SDAR_30B,
    "Gen-Verse/TraDo-4B-Instruct": SDAR_4B,
    "Gen-Verse/TraDo-8B-Instruct": SDAR_8B,
    "Gen-Verse/TraDo-8B-Thinking": SDAR_8B,
    "OpenMOSS-Team/DiRL-8B-Instruct": SDAR_8B,
}


def shapes(model: ModelSource, attention: str) -> DiffusionLM:
    """Load a model without its weights; all of it has to be on this machine. attention: as `load` takes it."""
    return model.load("float32", "meta", attention)


def outline(model: ModelSource, attention: str) -> DiffusionLM:
    """Load a model without its weights, from as little of it as there is on this machine.

    Of a model of the Hub that is not here, or only in part, its config.json is enough; of those in PUBLISHED nothing
    is needed, and then it has no tokenizer. Raises DirlError as `load` does where there is neither.
    """
    try:
        return shapes(model, attention)
    except NotDownloaded:
        if not isinstance(model, SavedModel):
            raise

        # An interrupted download may have left the configuration, which tells more than our table.
        stored = ModelDirectory(model.path)
        directory = hub.cached_config_directory(model.path)
        if directory is not None:
            check_safe_checkpoint(directory)
            tokenizer = stored.tokenizer(directory)
            return model.outline(stored.config(directory, pick_attention(attention, "meta")), tokenizer)

        if model.path not in PUBLISHED:
            raise
        shape: Any = COMMON | PUBLISHED[model.path]
        kind = SDARMoeConfig if "num_experts" in shape else SDARConfig
        config = kind(**shape)
        config._attn_implementation = pick_attention(attention, "meta")
        return model.outline(config, None)
