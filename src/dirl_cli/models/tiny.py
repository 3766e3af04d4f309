"""The embedded model: 0.5 million parameters and a tokenizer, both made on the spot from nothing but code."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dirl_cli.errors import DirlError
from dirl_cli.models.load import (
    DiffusionLM,
    diffusion_lm,
    fitting_attention,
    pick_attention,
    pick_device,
    pick_dtype,
)
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
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
        """Make a random model, the same for the same seed. The parameters are those of `SavedModel.load`."""
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
            # else the pad token's row would begin at zero, where the first norm has a slope of a thousand
            pad_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        config._attn_implementation = fitting_attention(config, pick_attention(attention, device), device)

        # The caller's random numbers stay where they are, so that a run does not depend on how its model was made.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = SDARForCausalLM(config)
        config.pad_token_id = tokenizer.pad_token_id
        torch.nn.Module.to(model, device=device, dtype=pick_dtype(dtype, device)).eval()
        return diffusion_lm(model, tokenizer, self.block_size, tokenizer.mask_token_id)


VOCABULARY = 373
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>")
# Qwen2's words: a letter run takes one character before it along, every digit stands alone.
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ROLES = ("user", "assistant")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most 373 tokens that reads any text; ids 0 to 3: pad, turn start, turn end and mask."""
    # As Qwen's tokenizers split text, so that what reads one of theirs reads this one.
    pad, start, end, mask = SPECIAL
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    # All 256 bytes are in the alphabet, so that no text is unknown.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = ROLES * 1000  # one token each, although the texts do not hold them
    tokenizer.train_from_iterator(chain(texts, roles), trainer)

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        mask_token=mask,
        additional_special_tokens=[start],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
