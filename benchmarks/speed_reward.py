"""What the speed reward adds to tokens per forward and costs in accuracy: the same starts, with it and without.

python -m benchmarks.speed_reward       # about 20 minutes on two cores; continues where it was stopped
"""

from pathlib import Path

from benchmarks.experiment import ROOT, SEEDS, at_once, card, evaluated, fine_tuned, mean_and_error, percent

# Groups are kept where the reward differs, all-correct ones among them: only there can speed alone be rewarded.
REWARDS = {
    "accuracy alone": ["reward=accuracy"],
    "accuracy + 0.5 speed": ["reward=speed", "reward.weights.speed=0.5"],
    "accuracy + 2 speed": ["reward=speed", "reward.weights.speed=2.0"],
}
STARTS = {"solved already": ("sft-worked", ["data.worked=1.0"]), "mixed": ("sft", [])}


def main() -> None:
    at_once(fine_tuned(seed, *words, name=room)[1] for room, words in STARTS.values() for seed in SEEDS)
    at_once(
        ["rl", "experiment=tiny_rl", f"seed={seed}", f"model={fine_tuned(seed, name=room)[0]}",
         f"out={run(room, reward, seed)}", "show_every=0", *words]
        for room, _ in STARTS.values()
        for reward, words in REWARDS.items()
        for seed in SEEDS
    )  # fmt: skip
    print("| start | reward | greedy accuracy | tokens per forward | answer length |")
    print("|---|---|--:|--:|--:|")
    for start, (room, _) in STARTS.items():
        groups = {
            "before": [fine_tuned(seed, name=room)[0] for seed in SEEDS],
            **{reward: [run(room, reward, seed) / "model" for seed in SEEDS] for reward in REWARDS},
        }
        at_once(evaluated(model)[1] for models in groups.values() for model in models)
        for reward, models in groups.items():
            found = [card(model)["metrics"] for model in models]
            print(
                f"| {start} | {reward} | {percent([one['accuracy'] for one in found])}"
                f" | {mean_and_error([one['tokens_per_forward'] for one in found], 3)}"
                f" | {mean_and_error([one['length'] for one in found], 1)} |"
            )


def run(room: str, reward: str, seed: int) -> Path:
    return ROOT / f"speed-{room}-{reward.replace(' + ', '-').replace(' ', '-')}-{seed}"


if __name__ == "__main__":
    main()
