"""Log-probs and their gradient through a published vocabulary: the head's own backward against a checkpointed softmax.

python -m benchmarks.logprobs             # about ten minutes on one core, at most 9 GB
"""

import os
import platform
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.dipo_step import REPEATS, interleaved, memory
from dirl_cli.training.logprobs import linear_logprobs, tokens_at_once

VOCABULARY, WIDTH = 151_936, 1024
TOKENS, TIMED = 2048, 512  # where memory is measured; where time is
UNSAMPLED = torch.arange(151_669, VOCABULARY)
DTYPES = ("float32", "bfloat16")
CHUNK = 2048  # of the checkpointed side, as it was


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Autograd's backward, which computes a chunk again and keeps what each operation on it made."""

    def scored(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight).float() / 1.0
        logprobs = logits.index_fill(-1, UNSAMPLED, -torch.inf).log_softmax(-1)
        known = logprobs.detach()
        entropy = -(known.exp() * known.clamp(min=torch.finfo(known.dtype).min)).sum(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy

    pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    parts = [checkpoint(scored, *piece, use_reentrant=False) for piece in pieces]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def by_hand(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return linear_logprobs(hidden, weight, targets, 1.0, UNSAMPLED, tokens_at_once(VOCABULARY))[:2]


SIDES = {f.__name__: f for f in (checkpointed, by_hand)}


def case(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a head, targets and the advantage of each."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5).requires_grad_()
    targets = torch.randint(0, 151_643, (tokens,), generator=generator)
    return hidden, weight, targets, torch.randn(tokens, generator=generator)


def update(side: str, hidden: Tensor, weight: Tensor, targets: Tensor, advantage: Tensor, dtype: str) -> list[Tensor]:
    """Log-probs, entropies and the gradients of the hidden states and of the weight."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logprobs, entropies = SIDES[side](hidden, weight, targets)
    gradients = torch.autograd.grad((logprobs * advantage).sum(), (hidden, weight))
    return [logprobs.detach(), entropies, *gradients]


def peak(side: str, dtype: str) -> None:
    """Print what one update holds at most beyond its inputs, in MiB; the process does nothing else."""
    update(side, *case(2), dtype)  # libraries set themselves up at their first use
    given = case(TOKENS)
    Path("/proc/self/clear_refs").write_text("5")  # start VmHWM anew
    before = memory("VmRSS")
    update(side, *given, dtype)
    print(memory("VmHWM") - before)


def peak_of(side: str, dtype: str) -> float:
    """`peak` in a process of its own, whose freed memory goes back at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.logprobs", "peak", side, dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def compare() -> None:
    given = case(TIMED)
    old, new = (update(side, *given, "float32") for side in SIDES)
    print(
        f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}, fp32. Vocabulary"
        f" {VOCABULARY:,}, width {WIDTH:,}; seconds of {TIMED:,} tokens, MiB of {TOKENS:,}. Relative differences:"
    )
    for name, ours, theirs in zip(("log-prob", "entropy", "hidden gradient", "weight gradient"), new, old, strict=True):
        print(f"  {name}: {((ours - theirs).norm() / theirs.norm()).item():.1e}")
    del old, new
    peaks = {(side, dtype): peak_of(side, dtype) for side in SIDES for dtype in DTYPES}
    times = interleaved(*(partial(update, side, *given, "float32") for side in SIDES))
    faster = statistics.median(a / b for a, b in zip(*times, strict=True))
    print("\n| | CPU seconds | MiB, fp32 | MiB, bf16 |\n|---|--:|--:|--:|")
    for side, seconds in zip(SIDES, times, strict=True):
        cells = [f"{peaks[side, dtype]:,.0f}" for dtype in DTYPES]
        print(f"| {side} | {statistics.median(seconds):.1f} | {' | '.join(cells)} |")
    ratios = [f"{peaks['checkpointed', dtype] / peaks['by_hand', dtype]:.2f}" for dtype in DTYPES]
    print(f"| checkpointed ÷ by_hand, median of {REPEATS} interleaved | {faster:.2f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    peak(*sys.argv[2:]) if sys.argv[1:] else compare()
