"""Every algorithm on the embedded task: same rollout budget, three seeds, one table and one plot.

make compare-algos                      # about 25 minutes on two cores; continues where it was stopped
"""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.experiment import (
    ROOT,
    SEEDS,
    at_once,
    card,
    evaluated,
    fine_tuned,
    history,
    late,
    mean_and_error,
    percent,
)

ALGORITHMS = (
    "dipo",
    "dr_grpo",
    "grpo",
    "gspo",
    "tracerl",
    "justgrpo",
    "unigrpo",
    "coupled_masks",
    "espo",
    "diffu_grpo",
)


def main() -> None:
    at_once(fine_tuned(seed)[1] for seed in SEEDS)
    at_once(
        ["rl", "experiment=tiny_rl", f"algo={name}", f"seed={seed}", f"model={fine_tuned(seed)[0]}",
         f"out={run(name, seed)}", "show_every=0"]
        for name in ALGORITHMS
        for seed in SEEDS
    )  # fmt: skip
    at_once(evaluated(run(name, seed) / "model")[1] for name in ALGORITHMS for seed in SEEDS)
    print("| algo | rollouts at T = 1, last 15 steps | greedy | tokens per forward | token-forwards a step |")
    print("|---|--:|--:|--:|--:|")
    for name in sorted(ALGORITHMS, key=lambda name: -sum(late(run(name, seed), "accuracy") for seed in SEEDS)):
        runs = [run(name, seed) for seed in SEEDS]
        cards = [card(one / "model")["metrics"] for one in runs]
        print(
            f"| {name} | {percent([late(one, 'accuracy') for one in runs])}"
            f" | {percent([found['accuracy'] for found in cards])}"
            f" | {mean_and_error([found['tokens_per_forward'] for found in cards], 2)}"
            f" | {mean_and_error([late(one, 'token_forwards', 60) for one in runs], 0)} |"
        )
    draw(Path(__file__).parent / "compare_algos.png")


def run(name: str, seed: int) -> Path:
    return ROOT / f"algo-{name}-{seed}"


def draw(file: Path) -> None:
    """Rollout accuracy over steps, mean of the seeds, smoothed over 9 steps."""
    figure = Figure(figsize=(10, 5.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for i, name in enumerate(ALGORITHMS):
        curves = [[line["accuracy"] for line in history(run(name, seed)) if "accuracy" in line] for seed in SEEDS]
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        smooth = [sum(mean[max(0, j - 4) : j + 5]) / len(mean[max(0, j - 4) : j + 5]) for j in range(len(mean))]
        axes.plot(range(1, len(smooth) + 1), smooth, label=name, linewidth=1.8, color=f"C{i}")
    axes.set_xlabel("step")
    axes.set_title("Accuracy of rollouts at temperature 1", loc="left")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(color="#d9dce1", linewidth=0.6)
    axes.legend(frameon=False, ncols=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
