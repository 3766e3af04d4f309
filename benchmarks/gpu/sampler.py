"""Samplers, the same weights and the same schedule: native, LMDeploy, and the published loop on plain transformers.

python -m benchmarks.gpu.sampler [toy|1.7B|8B] [batch …]
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch

from benchmarks.gpu.replay import MEAN_STEPS, PATTERNS
from benchmarks.gpu.shapes import DEVICE, DTYPE, fused_roofline, lmdeploy, machine, random_model, row, seconds, table
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.types import Decoding, Trajectory
from tests.reference.published_sampler import reference_sample

REPEATS = 5 if DEVICE == "cuda" else 1
LOOP_TOKENS = 32  # the published loop makes some twenty a second
SCHEDULES = {  # denoising steps a block, in the mean
    "static, S = 4": (4, Decoding(strategy="low_confidence_static", denoising_steps=4)),
    "static, S = 2": (2, Decoding(strategy="low_confidence_static", denoising_steps=2)),
    "recorded trace": (MEAN_STEPS, Decoding(denoising_steps=4, strategy="benchmarks.gpu.replay.replayed")),
}
GOALS = (
    "Goals: native ≥ 2.5× LMDeploy at batch ≤ 8 and ≥ 1.5× at batch ≥ 128; 6× the loop at batch 1;"
    " 70 % of the fused roofline at batch ≥ 32"
)


def main(shape: str = "1.7B", *batches: str) -> None:
    prompt, new = (128, 256) if DEVICE == "cuda" else (10, 24)
    lm = random_model(shape, "sdpa")
    theirs = lmdeploy(lm, 256, 0.5) if DEVICE == "cuda" and find_spec("lmdeploy") else None
    print(
        f"{machine()}. {shape}, {DTYPE}, prompts of {prompt} and answers of {new} tokens, greedy, no stop token."
        f" Answer tokens/s: median of {REPEATS} ± half the spread; loop: one sequence at a time, {LOOP_TOKENS} tokens"
        f" of it. {GOALS}"
    )
    engines = ("loop", "LMDeploy", "native", "native ÷ LMDeploy", "÷ loop")
    table("schedule", "batch", *engines, "of the fused roofline", "same answers")
    for name, (steps, decoding) in SCHEDULES.items():
        few = min(new, LOOP_TOKENS)
        loop, _ = speed(few, lambda d=decoding, n=few: published(lm, prompts(1, prompt)[0], n, d), 2)
        for batch in map(int, batches or ("1", "32", "128", "256")):
            compare(lm, theirs, name, batch, steps, decoding, loop, prompt, new)


def compare(
    lm: DiffusionLM,
    theirs: Sampler | None,
    name: str,
    batch: int,
    steps: float,
    decoding: Decoding,
    loop: float,
    prompt: int,
    new: int,
) -> None:
    """A row: both engines on the same prompts."""
    asked = prompts(batch, prompt)
    decoding = Decoding(decoding.block_size, decoding.denoising_steps, decoding.strategy, max_new_tokens=new)
    answers: dict[str, list[Trajectory]] = {}

    def work(engine: Sampler, of: str) -> Callable[[], None]:
        def sample() -> None:
            answers[of] = [one for [one] in engine.sample(asked, 1, decoding)]

        return sample

    native, spread = speed(batch * new, work(NativeSampler(lm, batch), "native"))
    share = f"{100 * native / fused_roofline(lm, batch, prompt + new // 2, steps):.0f} %"
    other, ratio, same = "—", "—", "—"
    if theirs:
        rate, rate_spread = speed(batch * new, work(theirs, "theirs"))
        other, ratio = f"{rate:,.0f} ± {rate_spread:,.0f}", f"{native / rate:.2f}×"
        pairs = zip(answers["native"], answers["theirs"], strict=True)
        same = f"{sum((a.token_ids, a.reveal_step) == (b.token_ids, b.reveal_step) for a, b in pairs)}/{batch}"
    row(
        name,
        batch,
        f"{loop:,.0f}",
        other,
        f"{native:,.0f} ± {spread:,.0f}",
        ratio,
        f"{native / loop:.1f}×",
        share,
        same,
    )


def published(lm: DiffusionLM, prompt: list[int], new: int, decoding: Decoding) -> None:
    trace = PATTERNS if decoding.strategy.startswith("replay") else None
    with torch.device(DEVICE):
        reference_sample(lm, prompt, new, decoding.denoising_steps, trace)


def speed(tokens: int, work: Callable[[], object], repeats: int = REPEATS) -> tuple[float, float]:
    """Tokens per second, and half the spread."""
    median, spread = seconds(work, repeats)
    return tokens / median, tokens * spread / 2 / median**2


def prompts(batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, 300, (batch, length), generator=generator, device="cpu").tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
