"""Models of the published shapes with random weights, made on the device, and how to time on it."""

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dirl_cli.models.checkpoint import DiffusionLM, diffusion_lm
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM

BLOCK, MASK = 4, 151669
SHAPES = {  # hidden, layers, heads, intermediate: method.md §1
    "toy": (256, 2, 2, 512),
    "1.7B": (2048, 28, 16, 6144),
    "8B": (4096, 36, 32, 12288),
}
BANDWIDTH, FLOPS = 3.0e12, 798e12  # H100: bytes/s and bf16 FLOP/s, measured


def random_model(shape: str, attention: str, dtype: torch.dtype = torch.bfloat16) -> DiffusionLM:
    """An SDAR on the GPU whose prompts and answers mean nothing."""
    hidden, layers, heads, intermediate = SHAPES[shape]
    config = SDARConfig(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(heads, 8),
        head_dim=128,
        intermediate_size=intermediate,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=151643,
        eos_token_id=151645,
        bos_token_id=None,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = SDARForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return diffusion_lm(model, None, BLOCK, MASK)


def saved(lm: DiffusionLM, directory: Path, tokenizer: str) -> str:
    """A checkpoint with the tokenizer of a directory, such as that of a published model, which LMDeploy wants too."""
    lm.model.save_pretrained(directory)
    shutil.copytree(tokenizer, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    return str(directory)


def seconds(work: Callable[[], object], repeats: int = 5) -> tuple[float, float]:
    """Median and spread (max - min) of `repeats` runs after one that warms up."""
    work()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found), max(found) - min(found)


def machine() -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def fused_roofline(lm: DiffusionLM, batch: int, context: int, steps: int) -> float:
    """Answer tokens per second of the best engine there could be, `performance.md`'s model, commits fused.

    A block costs `steps` forwards, the first of which also commits the block before it; on average half of the
    block's rows go through the head. context: cached tokens of each sequence, on average.
    """
    config = lm.model.config
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for p in lm.model.parameters()) - 2 * head
    cached = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes a token
    total = 0.0
    for step in range(steps):
        queries = batch * BLOCK * (2 if step == 0 else 1)
        masked = batch * (BLOCK - step * BLOCK // steps)
        total += max(2 * body / BANDWIDTH, 2 * body * queries / FLOPS)
        total += max(2 * head / BANDWIDTH, 2 * head * masked / FLOPS) + 4 * masked * config.vocab_size / BANDWIDTH
        total += batch * context * cached / BANDWIDTH
    return batch * BLOCK / total
