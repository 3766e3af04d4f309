"""Does reinforcement make a model of larger blocks faster? The embedded model in blocks of 8, by rewards of speed.

python -m benchmarks.faster 8            # leaves the models that it starts with
python -m benchmarks.larger_blocks_rl    # fifteen minutes on two cores; continues where it was stopped

From the model whose blocks have grown, which has room: 3.5 to 4.5 tokens per forward where three blocks allow 6.1.
One seed.
"""

from pathlib import Path

from benchmarks.experiment import ROOT, at_once, early, late
from benchmarks.faster import GROWN, home

STEPS = 90
START = home(8, GROWN, 0) / "model"
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


def main() -> None:
    at_once(
        ["rl", "experiment=tiny_rl", f"model={START}", f"steps={STEPS}", "show_every=0", "eval_problems=0",
         *words, f"out={run(words)}"]
        for words in TRIALS
    )  # fmt: skip
    print("| `dirl rl` | accuracy of rollouts % | tokens per forward |")
    print("|---|--:|--:|")
    for words in TRIALS:
        accuracy = [100 * part(run(words), "accuracy") for part in (early, late)]
        speed = [part(run(words), "tokens_per_forward") for part in (early, late)]
        print(f"| `{' '.join(words)}` | {accuracy[0]:.1f} → {accuracy[1]:.1f} | {speed[0]:.2f} → {speed[1]:.2f} |")


def run(words: list[str]) -> Path:
    return ROOT / "-".join(["larger-blocks", *words])


if __name__ == "__main__":
    main()
