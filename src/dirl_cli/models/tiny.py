"""The embedded model: 0.5 million parameters and a tokenizer, both made on the spot from nothing but code."""

from dataclasses import dataclass
from itertools import islice

import torch

from dirl_cli.errors import DirlError
from dirl_cli.models.checkpoint import DiffusionLM, diffusion_lm, pick_attention, pick_device, pick_dtype
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
from dirl_cli.models.tokenizer import train_tokenizer
from dirl_cli.ranges import Count, Seed


@dataclass(frozen=True)
class Tiny:
    """A freshly initialised SDAR with a vocabulary learned from the arithmetic problems."""

    name: str = "tiny"
    block_size: Count = 4
    hidden_size: Count = 128
    num_hidden_layers: Count = 2
    num_attention_heads: Count = 4
    intermediate_size: Count = 384
    max_position_embeddings: Count = 1024
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise DirlError(
                f"model.hidden_size={self.hidden_size}: give a multiple of twice model.num_attention_heads,"
                f" which is {self.num_attention_heads}"
            )

    def load(self, dtype: str = "auto", device: str = "auto", attention: str = "auto") -> DiffusionLM:
        """A new random model, the same for the same seed."""
        from dirl_cli.data.arithmetic import Arithmetic

        device = pick_device(device)
        tokenizer = train_tokenizer(islice(Arithmetic().texts(), 2000))
        config = SDARConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_attention_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            pad_token_id=None,  # else its row would begin at zero, where the first norm has a slope of a thousand
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        config._attn_implementation = pick_attention(attention, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = SDARForCausalLM(config)
        config.pad_token_id = tokenizer.pad_token_id
        torch.nn.Module.to(model, device=device, dtype=pick_dtype(dtype, device)).eval()
        return diffusion_lm(model, tokenizer, self.block_size, tokenizer.mask_token_id)
