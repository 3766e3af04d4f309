"""What the speed reward adds to tokens per forward and costs in accuracy: the same start, with it and without.

python benchmarks/speed_reward.py       # about 20 minutes on two cores; continues where it was stopped
"""

from experiment import ROOT, SEEDS, at_once, card, evaluated, fine_tuned, mean_and_error, percent

# From a policy that already solves the task, so that speed is what is left to win; groups are kept where the reward
# differs, all-correct ones among them.
VARIANTS = {
    "accuracy alone": ["reward=accuracy"],
    "accuracy + 0.5 speed": ["reward=speed", "reward.weights.speed=0.5"],
    "accuracy + 2 speed": ["reward=speed", "reward.weights.speed=2.0"],
}


def main() -> None:
    at_once(fine_tuned(seed, "data.worked=1.0", name="sft-worked")[1] for seed in SEEDS)
    at_once(
        ["rl", f"seed={seed}", f"model={fine_tuned(seed, name='sft-worked')[0]}", f"out={run(name, seed)}",
         "show_every=0", *words]
        for name, words in VARIANTS.items()
        for seed in SEEDS
    )  # fmt: skip
    groups = {
        "before": [fine_tuned(seed, name="sft-worked")[0] for seed in SEEDS],
        **{name: [run(name, seed) / "model" for seed in SEEDS] for name in VARIANTS},
    }
    at_once(evaluated(model)[1] for models in groups.values() for model in models)
    print("| reward | greedy accuracy | tokens per forward | answer length |")
    print("|---|--:|--:|--:|")
    for name, models in groups.items():
        found = [card(model)["metrics"] for model in models]
        print(
            f"| {name} | {percent([one['accuracy'] for one in found])}"
            f" | {mean_and_error([one['tokens_per_forward'] for one in found], 3)}"
            f" | {mean_and_error([one['length'] for one in found], 1)} |"
        )


def run(name: str, seed: int):
    return ROOT / f"speed-{name.replace(' + ', '-').replace(' ', '-')}-{seed}"


if __name__ == "__main__":
    main()
