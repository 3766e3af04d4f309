"""Models of the published shapes with random weights, made on the device, and how to time on it.

Without a GPU everything here runs on the CPU in fp32, which shows that it runs and no more.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from dirl_cli.data.arithmetic import Arithmetic
from dirl_cli.models.load import DiffusionLM, diffusion_lm
from dirl_cli.models.save import save_published
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
from dirl_cli.models.tiny import train_tokenizer
from dirl_cli.rollout.engines import Lmdeploy
from dirl_cli.rollout.sampler import Sampler

REPOSITORY = Path(__file__).parents[2]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
EXACT = DEVICE == "cpu"  # fp32: two ways to compute the same differ in the last bits only
BLOCK = 4
VOCABULARY = 151936 if DEVICE == "cuda" else 1024
MASK = VOCABULARY - 267  # 151669 as published
SHAPES = {  # hidden, layers, heads, intermediate: method.md §1
    "toy": (256, 2, 2, 512),
    "1.7B": (2048, 28, 16, 6144),
    "8B": (4096, 36, 32, 12288),
}
BANDWIDTH, FLOPS = 3.0e12, 798e12  # H100: bytes/s and bf16 FLOP/s, measured


def random_model(shape: str, attention: str, dtype: torch.dtype = DTYPE) -> DiffusionLM:
    """An SDAR on the device whose prompts and answers mean nothing; its tokenizer is beside it once it is saved."""
    hidden, layers, heads, intermediate = SHAPES[shape]
    config = SDARConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(heads, 8),
        head_dim=128,
        intermediate_size=intermediate,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = SDARForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return diffusion_lm(model, None, BLOCK, MASK)


def saved(lm: DiffusionLM, directory: Path, tokenizer: str | None = None) -> str:
    """A checkpoint to start an engine from. tokenizer: a directory; without one, the embedded tokenizer is saved."""
    save_published(directory, lm.model, None if tokenizer else train_tokenizer(islice(Arithmetic().texts(), 2000)))
    if tokenizer:
        shutil.copytree(tokenizer, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    return str(directory)


def lmdeploy(lm: DiffusionLM, max_batch: int, cache_share: float) -> Sampler:
    """LMDeploy with the weights of `lm`."""
    with tempfile.TemporaryDirectory() as directory:
        lm.model.name_or_path = saved(lm, Path(directory) / "model")
        return Lmdeploy(max_batch, cache_share).start(lm)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int = 5) -> tuple[float, float]:
    """Median and spread (max - min) of `repeats` runs after one that warms up."""
    work()
    found = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found), max(found) - min(found)


def machine() -> str:
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, so that no figure means anything"
    return f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def body_and_head(lm: DiffusionLM) -> tuple[int, int]:
    """Parameters of the layers, and of the head."""
    head = lm.model.config.vocab_size * lm.model.config.hidden_size
    return sum(p.numel() for p in lm.model.parameters()) - 2 * head, head


def fused_roofline(lm: DiffusionLM, batch: int, context: int, steps: float) -> float:
    """Answer tokens per second of the best engine there could be, `performance.md`'s model, commits fused.

    A block costs `steps` forwards, in the mean, the first of which also commits the block before it; of their rows on
    average half go through the head. context: cached tokens of each sequence, on average.
    """
    config = lm.model.config
    body, head = body_and_head(lm)
    cached = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes a token
    masked = batch * BLOCK * (steps + 1) / (2 * steps)

    def forward(queries: int) -> float:
        layers = max(2 * body / BANDWIDTH, 2 * body * queries / FLOPS)
        logits = max(2 * head / BANDWIDTH, 2 * head * masked / FLOPS) + 4 * masked * config.vocab_size / BANDWIDTH
        return layers + logits + batch * context * cached / BANDWIDTH

    return batch * BLOCK / (forward(2 * batch * BLOCK) + (steps - 1) * forward(batch * BLOCK))


def table(*columns: str) -> None:
    """Begin a table; the first column is on the left, numbers are on the right."""
    print(f"\n| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}")


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
