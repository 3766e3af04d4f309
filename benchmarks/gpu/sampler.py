"""Samplers on a GPU, the same weights and the same fixed schedule: native, LMDeploy, and the published loop.

python benchmarks/gpu/sampler.py TOKENIZER_DIRECTORY [toy|1.7B|8B] [batch …]
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from shapes import fused_roofline, machine, random_model, saved, seconds

from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.types import Decoding

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import reference_sample

PROMPT, NEW, REPEATS = 128, 256, 3


def main(tokenizer: str, shape: str = "1.7B", *batches: str) -> None:
    lm = random_model(shape, "sdpa")
    print(f"{machine()}, {shape}, bf16, {PROMPT} prompt and {NEW} new tokens, static schedule, greedy, no stop token;"
          f" answer tokens/s, median of {REPEATS}")  # fmt: skip
    print("\n| batch | S | loop (one at a time) | LMDeploy | native | native ÷ LMDeploy | of the fused roofline |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    with torch.device("cuda"):
        loop = {
            steps: tokens_per_second(1, lambda s=steps: reference_sample(lm, prompts(1)[0], NEW, s)) for steps in (4, 2)
        }
    theirs = lmdeploy(lm, tokenizer) if find_spec("lmdeploy") else None
    for batch in map(int, batches or ("1", "8", "32", "128")):
        for steps in (4, 2):
            row(lm, batch, steps, loop[steps], theirs)
    if theirs:
        median, spread = seconds(lambda: theirs.update_weights(lm.model.named_parameters(), 1), REPEATS)
        print(f"\nWeight push into LMDeploy, on the device: {1000 * median:.1f} ± {1000 * spread:.1f} ms;"
              " native shares storage: 0 bytes")  # fmt: skip


def row(lm: DiffusionLM, batch: int, steps: int, loop: float, theirs: Sampler | None) -> None:
    decoding = Decoding(strategy="low_confidence_static", denoising_steps=steps, max_new_tokens=NEW)
    ours = NativeSampler(lm, batch)
    rates = [
        tokens_per_second(batch, lambda one=one: one.sample(prompts(batch), 1, decoding))
        for one in samplers(ours, theirs)
    ]
    native, other = rates[0], rates[1] if theirs else None
    share = native / fused_roofline(lm, batch, PROMPT + NEW // 2, steps)
    compared = f"{other:,.0f} | {native:,.0f} | {native / other:.2f}×" if other else f"— | {native:,.0f} | —"
    print(f"| {batch} | {steps} | {loop:,.0f} | {compared} | {100 * share:.0f} % |", flush=True)


def samplers(ours: Sampler, theirs: Sampler | None) -> Iterator[Sampler]:
    yield ours
    if theirs:
        yield theirs


def tokens_per_second(batch: int, work: Callable[[], object]) -> float:
    return batch * NEW / seconds(work, REPEATS)[0]


def prompts(batch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, 300, (batch, PROMPT), generator=generator, device="cpu").tolist()


def lmdeploy(lm: DiffusionLM, tokenizer: str) -> Sampler:
    from dirl_cli.rollout.lmdeploy import LmdeploySampler, start_engine

    directory = saved(lm, Path(tempfile.mkdtemp()) / "model", tokenizer)
    return LmdeploySampler(lm, start_engine(lm, directory, 256, 0.5))


if __name__ == "__main__":
    main(*sys.argv[1:])
