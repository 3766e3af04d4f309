"""Attention of packed rows on a CPU, by tiles against a dense mask: the same gradients, less time and memory.

python -m benchmarks.attention            # some minutes on one core, at most 4 GB
"""

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import sampler
from benchmarks.dipo_step import REPEATS, interleaved, memory
from dirl_cli.data.arithmetic import Arithmetic
from dirl_cli.data.chat import encode_demonstrations
from dirl_cli.diffusion.layout import PADDING, Rows, lay_out, pack
from dirl_cli.diffusion.masking import CountPerBlock, Example, example
from dirl_cli.models import attention
from dirl_cli.models.attention import dense_mask
from dirl_cli.models.attention_cpu import TiledAttention, attention_tiles
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.tiny import Tiny
from dirl_cli.sft.batches import Noise
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.types import Instruction

HEADS, SIZE = 4, 32  # of attention alone: those of the embedded model
BLOCK, MASK = 4, 49
PROMPT = 32
LARGER = replace(sampler.LARGER, max_position_embeddings=8192)
ALWAYS = {"dense": sys.maxsize, "tiles": 0}  # rows that have a dense mask
Gradients = tuple[Tensor, ...]


def rows_of(length: int, answer: int, views: int) -> Rows:
    """A row of about `length` tokens of answers, half of whose tokens are hidden in one view, or all in several."""
    generator = torch.Generator().manual_seed(0)
    tokens = (PROMPT + answer) // BLOCK * BLOCK
    step = torch.randint(1, max(views, 2) + 1, (tokens,), generator=generator)
    masked = step >= torch.arange(1, views + 1)[:, None] if views > 1 else step[None] == 1
    scored = step == torch.arange(1, views + 1)[:, None]
    scored[:, :PROMPT] = False
    strip = lay_out(torch.randint(2, 45, (tokens,), generator=generator), masked, scored, scored.float(), BLOCK, MASK)
    return pack([strip] * max(length // len(strip), 1), length, BLOCK, 0)


LAYOUTS: dict[str, Callable[[int], Rows]] = {
    "fine-tuning, one answer a row": lambda length: rows_of(length, length // 2 - PROMPT, 1),
    "fine-tuning, answers of 96": lambda length: rows_of(length, 96, 1),
    "DiPO, 4 steps a block, one answer": lambda length: rows_of(length, length * 2 // 9, 4),
}


def by_mask(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    seen = dense_mask(rows.coordinates)
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def by_tiles(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    return TiledAttention.apply(query, key, value, attention_tiles(rows.coordinates, torch.float32), SIZE**-0.5)


def attention_gradients(way: Callable[..., Tensor], heads: Gradients, upstream: Tensor, rows: Rows) -> Gradients:
    return torch.autograd.grad(way(*heads, rows), heads, upstream)


def compare_attention() -> None:
    print("\n| attention alone | tokens | gradients differ by | dense, CPU s | tiles, CPU s | faster |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, layout in LAYOUTS.items():
        for length in (1024, 4096, 8192):
            rows = layout(length)
            generator = torch.Generator().manual_seed(0)
            shape = (1, rows.token_ids.shape[1], HEADS, SIZE)
            *heads, upstream = (torch.randn(shape, generator=generator) for _ in range(4))
            upstream[rows.strip == PADDING] = 0
            heads = tuple(states.transpose(1, 2).requires_grad_() for states in heads)
            sides = [partial(attention_gradients, way, heads, upstream, rows) for way in (by_mask, by_tiles)]
            report(f"{name} | {rows.num_tokens:,}", *sides)


def demonstrations(lm: DiffusionLM, count: int) -> list[Example]:
    """The first demonstrations of the embedded word problems."""
    rows = list(islice(Arithmetic().demonstrations(), count))
    encoded = encode_demonstrations(lm.require_tokenizer(), rows, Instruction())
    return [example(token_ids, trained, BLOCK, lm.pad_token_id) for token_ids, trained in encoded]


def step(lm: DiffusionLM, rows: Rows, micro_rows: int, most: int) -> Gradients:
    """A forward and backward of all rows. most: tokens of a row that has a dense mask."""
    lm.model.zero_grad()
    before, attention.DENSE_TOKENS = attention.DENSE_TOKENS, most
    scorer = LogprobModel(lm.model)
    for part in rows.split(micro_rows):
        scorer(part)[0].sum().backward()
    attention.DENSE_TOKENS = before
    return tuple(parameter.grad for parameter in lm.model.parameters())


def compare_steps() -> None:
    print("\n| forward and backward | rows | gradients differ by | dense, CPU s | tiles, CPU s | faster |")
    print("|---|--:|--:|--:|--:|--:|")
    tiny = Tiny().load()
    batch = demonstrations(tiny, 32)
    for row_tokens, micro_rows in ((192, 4), (512, 4), (1024, 4), (4096, 1)):
        noise = Noise(CountPerBlock(), BLOCK, tiny.mask_token_id, tiny.pad_token_id, row_tokens)
        rows, _ = noise.rows(batch, 0)
        sides = [partial(step, tiny, rows, micro_rows, most) for most in ALWAYS.values()]
        report(f"tiny, 32 demonstrations | {' × '.join(map(str, rows.token_ids.shape))}", *sides)

    larger = LARGER.load()
    for name, layout in LAYOUTS.items():
        rows = layout(4096)
        sides = [partial(step, larger, rows, 1, most) for most in ALWAYS.values()]
        report(f"13 M, {name} | {' × '.join(map(str, rows.token_ids.shape))}", *sides)


def report(name: str, dense: Callable[[], Gradients], tiles: Callable[[], Gradients]) -> None:
    """Print a line of a table: how far the gradients are apart, the seconds of both sides, their ratio."""
    expected, found = (torch.cat([g.flatten().clone() for g in side()]) for side in (dense, tiles))
    difference = ((found - expected).norm() / expected.norm()).item()
    assert difference <= 1e-5, f"{name}: the gradients differ by {difference:.1e}"
    times = interleaved(dense, tiles)
    faster = statistics.median(a / b for a, b in zip(*times, strict=True))
    cells = [f"{difference:.0e}", *(f"{statistics.median(side):.3f}" for side in times), f"{faster:.2f}×"]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def peak(side: str) -> None:
    """Print what a step of the larger model on a row of 4,096 tokens holds at most beyond the model, in MiB."""
    lm, rows = LARGER.load(), next(iter(LAYOUTS.values()))(4096)
    step(lm, rows_of(200, 40, 1), 1, ALWAYS[side])  # libraries set themselves up at their first use
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start VmHWM anew
    step(lm, rows, 1, ALWAYS[side])
    print(memory("VmHWM") - before)


def peak_of(side: str) -> float:
    """`peak` in a process of its own, whose freed memory goes back at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.attention", "peak", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def compare() -> None:
    print(
        f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}, fp32, blocks of {BLOCK};"
        f" attention alone: {HEADS} heads of {SIZE}, masks and tiles made anew. Median of {REPEATS}, interleaved."
    )
    compare_attention()
    compare_steps()
    dense, tiles = (peak_of(side) for side in ALWAYS)
    print(f"\n13 M, one answer in a row of 4,096: {dense:.0f} MiB → {tiles:.0f}, {dense / tiles:.2f}× less.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    peak(*sys.argv[2:]) if sys.argv[1:] else compare()
