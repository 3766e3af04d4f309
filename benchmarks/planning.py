"""The embedded planning tasks: fine-tuned, then reinforced, and what the order of decoding does, on three seeds.

python -m benchmarks.planning           # Sudoku and Countdown; continues where it was stopped
python -m benchmarks.planning sudoku    # about a quarter of an hour on two cores
"""

import json
import sys
from pathlib import Path

from benchmarks.experiment import ROOT, SEEDS, at_once, mean_and_error, percent

ORDERS = {
    "surest first": ["decoding=static"],
    "left to right": ["decoding=sequential"],
    "two at once, the surest": ["decoding=static", "decoding.denoising_steps=2"],
    "all that are sure": ["decoding=dynamic"],
}
STAGES = ("sft", "rl")


def main() -> None:
    for task in sys.argv[1].split(",") if len(sys.argv) > 1 else ("sudoku", "countdown"):
        report(task)


def report(task: str) -> None:
    """Run what is not there yet of a task, and print its table."""
    at_once(["sft", f"experiment={task}_sft", f"seed={seed}", f"out={run(task, 'sft', seed)}"] for seed in SEEDS)
    at_once(
        ["rl", f"experiment={task}_rl", f"seed={seed}", f"model={run(task, 'sft', seed)}/model",
         f"out={run(task, 'rl', seed)}", "show_every=0"]
        for seed in SEEDS
    )  # fmt: skip
    at_once(
        ["eval", f"bench={task}", f"model={run(task, stage, seed)}/model",
         f"out={evaluation(task, stage, seed, order)}", *words]
        for stage in STAGES
        for seed in SEEDS
        for order, words in ORDERS.items()
    )  # fmt: skip
    print(f"\n| {task} | fine-tuned % | tok/fwd | reinforced % | tok/fwd |\n|---|--:|--:|--:|--:|")
    for order in ORDERS:
        cells = [order]
        for stage in STAGES:
            metrics = [measured(task, stage, seed, order) for seed in SEEDS]
            cells.append(percent([one["accuracy"] for one in metrics]))
            cells.append(mean_and_error([one["tokens_per_forward"] for one in metrics], 2))
        print(f"| {' | '.join(cells)} |")
    for stage in STAGES:
        print(f"Surest first minus left to right, {stage}, seed by seed: {percent(gains(task, stage))}")


def gains(task: str, stage: str) -> list[float]:
    """By how much surest first is more accurate than left to right, for each seed."""
    differences = []
    for seed in SEEDS:
        surest = measured(task, stage, seed, "surest first")["accuracy"]
        differences.append(surest - measured(task, stage, seed, "left to right")["accuracy"])
    return differences


def run(task: str, stage: str, seed: int) -> Path:
    return ROOT / f"planning-{task}-{stage}-{seed}"


def evaluation(task: str, stage: str, seed: int, order: str) -> Path:
    return ROOT / "eval" / f"planning-{task}-{stage}-{seed}-{order.replace(',', '').replace(' ', '-')}"


def measured(task: str, stage: str, seed: int, order: str) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((evaluation(task, stage, seed, order) / "eval_card.json").read_text())[
        "metrics"
    ]
    return metrics


if __name__ == "__main__":
    main()
