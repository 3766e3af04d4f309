"""Fewer forwards from a pretrained model: SmolLM2 learns word problems in blocks of 4, then in 8 from its own answers.

dirl download model=smollm2
python -m benchmarks.faster_smollm2     # an hour and a quarter on two cores; continues where it was stopped

One seed. All are measured on the first 500 problems of the test split, over a sweep of thresholds.
"""

import os

from benchmarks.experiment import ROOT, at_once, dirl
from benchmarks.faster import THRESHOLDS, Setting, area, as_accurate, plot, settings, sweep

HOME = ROOT / "faster-smollm2"
START = HOME / "blocks-of-4" / "model"
ANSWERS = HOME / "answers"
FASTER = HOME / "8-two-steps-as-one" / "model"
QUIET = ["eval_every=0", "eval_problems=0"]
TUNING = ["optim=adamw", "optim.lr=2e-4", "schedule=cosine", "schedule.warmup=10", "steps=250", "batch_size=16",
          "max_tokens=256", "row_tokens=512", "dtype=bfloat16", "save_every=50", *QUIET]  # fmt: skip
MALLOC = {  # as in scripts/smollm2.sh: a third of a step
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_MAX_": "0",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def main() -> None:
    os.environ.update(MALLOC)
    learn_blocks_of_4()
    answer()
    learn_blocks_of_8()
    models = {"the start, in blocks of 4": START, "blocks of 8, two steps as one": FASTER}
    at_once(sweep(model, "limit=500", "dtype=bfloat16") for model in models.values())
    show({name: settings(model) for name, model in models.items()})


def learn_blocks_of_4() -> None:
    """Twenty minutes: 160 steps of 16 demonstrations with their working."""
    words = ["model=smollm2", "steps=160", "data.held_out=0", "save_every=20", *QUIET]
    dirl("sft", "experiment=smollm2_words", *words, f"out={START.parent}", threads=2)


def answer() -> None:
    """Five minutes: an answer to each of 3,200 training problems, at temperature 1."""
    words = ["rl.rollout_only=true", "rl.filter=none", "rl.problems=160", "rl.group_size=1", "steps=20"]
    quiet = ["eval_problems=0", "show_every=0"]
    dirl("rl", "experiment=smollm2_words_rl", f"model={START}", *words, *quiet, f"out={ANSWERS}", threads=2)


def learn_blocks_of_8() -> None:
    """Half an hour: the right ones among these answers, two of a block's steps as one."""
    data = ["model.block_size=8", "data=rollouts", f"data.path={ANSWERS}"]
    masking = ["masking=trace", "masking.window=2", "masking.counted=masked"]
    dirl("sft", f"model={START}", *data, *masking, *TUNING, f"out={FASTER.parent}", threads=2)


def show(found: dict[str, list[Setting]]) -> None:
    """A row a model: its accuracy and tokens per forward at each threshold."""
    of_start = next(iter(found.values()))
    print(f"| | {' | '.join(THRESHOLDS.split(','))} | TPF as accurate as the start | AUP |")
    print(f"|---|{'---|' * len(of_start)}--:|--:|")
    for name, some in found.items():
        cells = [f"{100 * one.accuracy:.1f} ± {100 * one.error:.1f} % at {one.tpf:.2f}" for one in sorted(some)]
        fastest = as_accurate(some, of_start)
        reached = f"{fastest.tpf:.2f}" if fastest else "none"
        print(f"| {name} | {' | '.join(cells)} | {reached} | {area(some, of_start):.0f} |")
    curves = {name: [some] for name, some in found.items()}
    plot(curves, f"SmolLM2-135M, blocks of 4 and 8, thresholds {THRESHOLDS}", "faster_smollm2.png")


if __name__ == "__main__":
    main()
