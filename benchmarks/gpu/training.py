"""Training steps on a GPU: fine-tuning and DiPO, packed against the published expansion.

python benchmarks/gpu/training.py [toy|1.7B] [answer buffer]
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from shapes import BLOCK, FLOPS, MASK, machine, random_model, seconds

from dirl_cli.build import build
from dirl_cli.diffusion.masking import example
from dirl_cli.models.attention import dense_attention
from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.training.batches import Noise
from dirl_cli.training.logprobs import TokenScorer

sys.path.insert(0, str(Path(__file__).parents[1]))
import dipo_step

REPEATS = 3


def main(shape: str = "1.7B", buffer: str = "2046") -> None:
    lm = random_model(shape, "flex_attention")
    for parameter in lm.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    print(f"{machine()}, {shape}, bf16 weights, FlexAttention, median of {REPEATS}")
    print("\n| step | tokens | seconds | tokens/s | model FLOPs used | peak GiB above weights and gradients |")
    print("|---|--:|--:|--:|--:|--:|")
    fine_tuning(lm)
    for name, case in dipo_cases(int(buffer)).items():
        dipo(lm, name, case)


def fine_tuning(lm: DiffusionLM) -> None:
    """One row of 8,192 tokens of demonstrations, a noised copy of their answers beside them."""

    generator = torch.Generator().manual_seed(0)
    demonstrations = []
    for length in (700, 1100, 500, 900):
        ids = torch.randint(4, 300, (length,), generator=generator).tolist()
        demonstrations.append(example(ids, [i >= 100 for i in range(length)], BLOCK, lm.pad_token_id))
    masking = build(OmegaConf.load(dipo_step.REPOSITORY / "conf/masking/per_block.yaml"))
    rows, answers = Noise(masking, BLOCK, MASK, lm.pad_token_id, 8192).rows(demonstrations, 0)
    rows = rows.to(lm.device)

    def step() -> int:
        logprobs, _ = TokenScorer(lm.model).to(lm.device)(rows)
        (-(rows.weight * logprobs).sum() / answers).backward()
        return rows.num_tokens

    report(lm, "fine-tuning, packed", step)


def dipo_cases(buffer: int) -> dict[str, dipo_step.Case]:
    """As on a CPU, with answers that fill a buffer of `buffer` tokens, and ragged ones."""
    dipo_step.PROMPT, dipo_step.BUFFER = 126, buffer
    dipo_step.VOCABULARY, dipo_step.MASK, dipo_step.ROW_TOKENS = 151643, MASK, 16384
    return {"full": dipo_step.full(), "ragged": dipo_step.ragged()}


def dipo(lm: DiffusionLM, name: str, case: dipo_step.Case) -> None:
    ours = report(lm, f"DiPO {name}, packed", lambda: dipo_step.packed(lm, case, 16384))
    with torch.device("cuda"), dense_attention(lm.model):
        theirs = report(lm, f"DiPO {name}, expanded", lambda: dipo_step.expanded(lm, case))
    print(f"| DiPO {name}: packed is {theirs / ours:.1f}× faster | | | | | |", flush=True)


def report(lm: DiffusionLM, name: str, step: Callable[[], int]) -> float:
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    tokens = step()
    median, _ = seconds(step, REPEATS)
    body = sum(p.numel() for p in lm.model.parameters()) - lm.model.lm_head.weight.numel()
    used = 6 * body * tokens / median / FLOPS
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30
    print(
        f"| {name} | {tokens:,} | {median:.3f} | {tokens / median:,.0f} | {100 * used:.0f} % | {peak:.1f} |", flush=True
    )
    return median


if __name__ == "__main__":
    main(*sys.argv[1:])
