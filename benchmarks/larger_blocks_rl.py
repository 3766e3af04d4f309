"""Does reinforcement make a model of larger blocks faster? The embedded model in blocks of 8, by rewards of speed.

python -m benchmarks.faster 8            # leaves the models that it starts with
python -m benchmarks.larger_blocks_rl    # half an hour on two cores; continues where it was stopped

From the models whose blocks have grown, which have room: 3.5 to 4.5 tokens per forward where three blocks allow 6.1.
First many objectives on one seed, by their rollouts; then rounds of RAFT over three seeds, paid for accuracy or for
speed, on problems that training never saw, over a sweep of thresholds.
"""

import math
from pathlib import Path

from benchmarks.experiment import ROOT, SEEDS, at_once, early, late, mean_and_error
from benchmarks.faster import GROWN, as_accurate, cells, home, plot, settings, sweep

RANKED = ["reward=speed_rank", "rl.filter=reward"]
RAFT = ["algo=raft", *RANKED]
TRIALS = [
    ["reward=accuracy", "optim.lr=1e-4"],
    ["reward=accuracy", "optim.lr=1e-4", "decoding.threshold=0.98"],
    ["reward=accuracy", "optim.lr=1e-4", "decoding=static"],
    [*RANKED, "optim.lr=1e-4"],
    [*RANKED, "optim.lr=1e-4", "decoding.threshold=0.98"],
    [*RANKED, "optim.lr=2e-4", "decoding.threshold=0.98", "reward.weights.speed_rank=1"],
    [*RAFT, "optim.lr=2e-4"],
    [*RAFT, "optim.lr=1e-3"],
    [*RAFT, "optim.lr=1e-3", "rl.problems=64", "rl.mini_batches=8"],
]
ROUNDS = ["algo=raft", "optim.lr=5e-4", "rl.problems=64", "rl.mini_batches=8"]
PAID = {"by accuracy": [*ROUNDS, "reward=accuracy"], "by speed": [*ROUNDS, *RANKED]}


def main() -> None:
    one_seed()
    rounds()


def one_seed() -> None:
    """Many objectives from one model, by what their rollouts were at first and at last."""
    at_once(reinforcing(words, 0, steps=90) for words in TRIALS)
    print("| `dirl rl` | accuracy of rollouts % | tokens per forward |")
    print("|---|--:|--:|")
    for words in TRIALS:
        print(f"| `{' '.join(words)}` | {rollouts(run(words, 0))} |")


def rounds() -> None:
    """RAFT by either reward, over seeds: the table and the curve of `benchmarks.faster`."""
    at_once(reinforcing(words, seed, steps=150) for words in PAID.values() for seed in SEEDS)
    starts = [start(seed) for seed in SEEDS]
    models = {"none: the start": starts}
    models |= {name: [run(words, seed) / "model" for seed in SEEDS] for name, words in PAID.items()}
    at_once(sweep(model) for group in models.values() for model in group)
    print("| rounds | TPF as accurate as the start | most accurate % | TPF then | AUP |")
    print("|---|--:|--:|--:|--:|")
    for name, group in models.items():
        print(f"| {name} | {' | '.join(cells(group, starts))} |")

    print("\n| rounds | seed | accuracy of rollouts % | tokens per forward | TPF as accurate as the start, gained |")
    print("|---|--:|--:|--:|--:|")
    for name, words in PAID.items():
        gains = [gain(run(words, seed) / "model", start(seed)) for seed in SEEDS]
        for seed, gained in zip(SEEDS, gains, strict=True):
            print(f"| {name} | {seed} | {rollouts(run(words, seed))} | {gained:.2f} |")
        print(f"| {name} | all | | | {mean_and_error(gains, 2)} |")

    title = f"RAFT in blocks of 8, mean of {len(SEEDS)} seeds"
    plot({name: list(map(settings, group)) for name, group in models.items()}, title, "larger_blocks_rl.png")


def rollouts(directory: Path) -> str:
    """Two cells: what a run's rollouts were in its first and in its last steps."""
    accuracy = [100 * part(directory, "accuracy") for part in (early, late)]
    speed = [part(directory, "tokens_per_forward") for part in (early, late)]
    return f"{accuracy[0]:.1f} → {accuracy[1]:.1f} | {speed[0]:.2f} → {speed[1]:.2f}"


def gain(model: Path, before: Path) -> float:
    """How many more tokens per forward a model writes that is as accurate as it was before; nan if it is not."""
    after, at_first = (as_accurate(settings(one), settings(before)) for one in (model, before))
    return after.tpf - at_first.tpf if after and at_first else math.nan


def start(seed: int) -> Path:
    return home(8, GROWN, seed) / "model"


def reinforcing(words: list[str], seed: int, steps: int) -> list[object]:
    return ["rl", "experiment=tiny_rl", f"model={start(seed)}", f"steps={steps}", "show_every=0", "eval_problems=0",
            *words, f"seed={seed}", f"out={run(words, seed)}"]  # fmt: skip


def run(words: list[str], seed: int) -> Path:
    return ROOT / "-".join(["larger-blocks", *words, str(seed)])


if __name__ == "__main__":
    main()
