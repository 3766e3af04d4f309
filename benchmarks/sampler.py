"""The native sampler against the published loop: the same greedy tokens, fewer forwards, less time.

python -m benchmarks.sampler            # about twenty minutes on one core
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch

from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding
from tests.reference.published_sampler import reference_sample

NEW_TOKENS, REPEATS = 64, 7
LARGER = Tiny(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1536)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}, fp32,"
          f" {NEW_TOKENS} new tokens, static schedule, greedy, median of {REPEATS}")  # fmt: skip
    print(
        "\n| model | batch | S | answers equal | forwards per block, loop → ours | tokens/s, loop → ours | faster"
        " | plain products | reordered weights |"
    )
    print("|---|--:|--:|---|--:|--:|--:|--:|--:|")
    models = {"tiny, 0.5 M": Tiny(), "4 layers × 512, 13 M": LARGER}
    for name, model in models.items():
        lm = model.load()
        for batch, steps in ((1, 4), (1, 2), (1, 1), (8, 2), (32, 4), (32, 2)):
            compare(name, lm, batch, steps)
    throughput(Tiny().load())


def compare(name: str, lm, batch: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 300, (24 + i % 8,), generator=generator).tolist() for i in range(batch)]
    decoding = Decoding(strategy="low_confidence_static", denoising_steps=steps, max_new_tokens=NEW_TOKENS)
    samplers = {products: NativeSampler(lm, batch, products=products) for products in ("auto", "plain", "reordered")}
    slow = [reference_sample(lm, prompt, NEW_TOKENS, steps) for prompt in prompts]
    equal = len(prompts)
    for sampler in samplers.values():
        fast = [group[0] for group in sampler.sample(prompts, 1, decoding)]
        equal = min(equal, sum(answer == ours.token_ids for (answer, _), ours in zip(slow, fast, strict=True)))
    tokens = sum(len(ours.token_ids) for ours in fast)
    blocks = sum(-(-(len(p) % 4 + len(t.token_ids)) // 4) for p, t in zip(prompts, fast, strict=True))
    loop, *ours = interleaved(
        lambda: [reference_sample(lm, prompt, NEW_TOKENS, steps) for prompt in prompts],
        *(lambda sampler=sampler: sampler.sample(prompts, 1, decoding) for sampler in samplers.values()),
    )
    ratios = [statistics.median(a / b for a, b in zip(loop, times, strict=True)) for times in ours]
    rates = [tokens / statistics.median(times) for times in (loop, ours[0])]
    forwards = [sum(n for _, n in slow) / blocks, sum(t.forwards for t in fast) / blocks]
    print(
        f"| {name} | {batch} | {steps} | {equal}/{batch} | {forwards[0]:.2f} → {forwards[1]:.2f}"
        f" | {rates[0]:,.0f} → {rates[1]:,.0f} | {' | '.join(f'{ratio:.2f}×' for ratio in ratios)} |",
        flush=True,
    )


def interleaved(*sides: Callable[[], object]) -> list[list[float]]:
    """CPU seconds of each side, measured in turn."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(REPEATS):
        for side, collected in zip(sides, times, strict=True):
            start = time.process_time()
            side()
            collected.append(time.process_time() - start)
    return times


def throughput(lm) -> None:
    """Batched decoding of 64 problems with a fixed schedule, the rate that rollouts see."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 300, (24 + i % 8,), generator=generator).tolist() for i in range(64)]
    sampler = NativeSampler(lm, 64)
    print("\n| 64 problems, tokens per forward | answer tokens/s |")
    print("|--:|--:|")
    for steps in (4, 2, 1):
        options = {"strategy": "low_confidence_static", "denoising_steps": steps, "max_new_tokens": 32}
        decoding = Decoding(temperature=1.0, **options)
        [times] = interleaved(lambda d=decoding: sampler.sample(prompts, 1, d))
        tokens = sum(len(group[0].token_ids) for group in sampler.sample(prompts, 1, decoding))
        print(f"| {4 // steps} | {tokens / statistics.median(times):,.0f} |")


if __name__ == "__main__":
    main()
