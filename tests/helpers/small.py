"""A random model small enough for any test."""

import shutil
from pathlib import Path

import torch

from dirl_cli.models.load import DiffusionLM, diffusion_lm
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM

VOCABULARY, MASK, PAD = 50, 49, 0
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}


def small_lm(
    block_size: int = 4, seed: int = 0, attention: str = "sdpa", scale: float = 5.0, head_dim: int = 8
) -> DiffusionLM:
    """Two layers, 50 tokens, the mask token last; `scale` sharpens its random distributions."""
    config = SDARConfig(
        **SIZES | {"head_dim": head_dim},
        pad_token_id=None,  # else its row would be zero
        eos_token_id=1,
        bos_token_id=None,
    )
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = SDARForCausalLM(config).eval()
    config.pad_token_id = PAD
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return diffusion_lm(model, None, block_size, MASK)


def random_lm(kind: str, head_dim: int = 8) -> DiffusionLM:
    """kind: untied, tied or moe."""
    if kind == "untied":
        return small_lm(head_dim=head_dim)
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": head_dim}
    tied = SDARConfig(**sizes, tie_word_embeddings=True)
    model = SDARMoeForCausalLM(SDARMoeConfig(**sizes, **EXPERTS)) if kind == "moe" else SDARForCausalLM(tied)
    return diffusion_lm(model.eval(), None, 4, MASK)


def published_vocabulary(directory: Path, shared: Path) -> Path:
    """Save a random model of two layers with the real tokenizer and its 151 936 tokens."""
    config = SDARConfig(
        vocab_size=151936,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    shutil.copytree(shared / "models/sdar-tokenizer", directory)
    SDARForCausalLM(config).save_pretrained(directory)
    return directory


class Numbers:
    """A tokenizer of texts that are numbers of tokens."""

    chat_template = None

    def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(map(int, text.split())) for text in texts]}


def paid_by_the_letter(directory: Path) -> str:
    """An override that rewards answers by their letters, so that a model which has learned nothing has a signal."""
    (directory / "letters.py").write_text("def letters(answer):\n    return len(answer.completion)\n")
    return f"+reward.weights={{{directory}/letters.py\\:letters: 1.0}}"
