"""SDAR for transformers: Qwen3, dense or mixture of experts, under another attention mask and model type.

Importing this module registers `sdar` and `sdar_moe`, so that published checkpoints load without remote code.
"""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping


class SDARConfig(Qwen3Config):
    """Qwen3's configuration; `block_size` and `mask_token_id` ride along where a checkpoint names them."""

    model_type = "sdar"


class SDARForCausalLM(Qwen3ForCausalLM):
    """Qwen3 that predicts the token at its own position: logits are not shifted."""

    config_class = SDARConfig


class SDARMoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE's configuration; `block_size` and `mask_token_id` ride along as in `SDARConfig`."""

    model_type = "sdar_moe"


class SDARMoeForCausalLM(Qwen3MoeForCausalLM):
    """Qwen3-MoE that predicts the token at its own position, such as SDAR-30B-A3B."""

    config_class = SDARMoeConfig


AutoConfig.register("sdar", SDARConfig)
AutoConfig.register("sdar_moe", SDARMoeConfig)
AutoModelForCausalLM.register(SDARConfig, SDARForCausalLM)
AutoModelForCausalLM.register(SDARMoeConfig, SDARMoeForCausalLM)
AutoTokenizer.register(SDARConfig, Qwen2Tokenizer)
AutoTokenizer.register(SDARMoeConfig, Qwen2Tokenizer)
# Files hold each expert by itself, models the experts of a layer as one tensor.
register_checkpoint_conversion_mapping("sdar_moe", get_checkpoint_conversion_mapping("qwen3_moe"))
