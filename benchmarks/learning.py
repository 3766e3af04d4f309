"""Does it learn, on each of five seeds? Fine-tuning, then reinforcement, against as much more fine-tuning.

python -m benchmarks.learning           # about 45 minutes on two cores; continues where it was stopped
"""

from benchmarks.experiment import ROOT, at_once, card, evaluated, fine_tuned, history, late, mean_and_error, percent

SEEDS = range(5)
TASKS = {"mixed (default)": ("sft", ()), "every demonstration worked": ("sft-worked", ("data.worked=1.0",))}


def main() -> None:
    at_once(fine_tuned(seed, *words, name=name)[1] for name, words in TASKS.values() for seed in SEEDS)
    at_once(reinforcement(seed) for seed in SEEDS)
    # RL takes about as long as 450 steps of fine-tuning: as many more, on fresh optimizer and schedule
    at_once(
        ["sft", "experiment=tiny_sft", f"seed={seed}", f"model={fine_tuned(seed)[0]}", f"out={ROOT}/more-{seed}",
         "steps=450"]
        for seed in SEEDS
    )  # fmt: skip
    models = {
        **{name: [fine_tuned(seed, name=room)[0] for seed in SEEDS] for name, (room, _) in TASKS.items()},
        "mixed, then 120 RL steps": [ROOT / f"rl-{seed}" / "model" for seed in SEEDS],
        "mixed, then as much more fine-tuning": [ROOT / f"more-{seed}" / "model" for seed in SEEDS],
    }
    at_once(evaluated(model)[1] for group in models.values() for model in group)
    columns = ("greedy accuracy, each seed", "mean ± s.e.", "unseen numbers, each seed", "mean ± s.e.")
    print(f"| | {' | '.join(columns)} | tokens per forward | minutes |")
    print("|---|---|--:|---|--:|--:|--:|")
    for name, group in models.items():
        cards = [card(model) for model in group]
        accuracy = [one["metrics"]["accuracy"] for one in cards]
        unseen = [one["subsets"]["unseen"]["accuracy"] for one in cards]
        speed = mean_and_error([one["metrics"]["tokens_per_forward"] for one in cards], 2)
        minutes = max(seconds(model.parent) for model in group) / 60
        cells = [name, each(accuracy), percent(accuracy), each(unseen), percent(unseen), speed, f"{minutes:.1f}"]
        print(f"| {' | '.join(cells)} |")

    runs = [ROOT / f"rl-{seed}" for seed in SEEDS]
    print(f"\nRollouts at temperature 1, first and last 15 steps: {percent([first(run) for run in runs])} →"
          f" {percent([late(run, 'accuracy') for run in runs])}; largest |sampler - trainer| log-prob over all steps:"
          f" {max(line.get('mismatch_max', 0) for run in runs for line in history(run)):.1e}")  # fmt: skip


def each(shares: list[float]) -> str:
    """In percent, seed by seed."""
    return ", ".join(f"{100 * share:.1f}" for share in shares)


def seconds(run) -> float:
    return sum(value for line in history(run) for name, value in line.items() if name.startswith("seconds/"))


def first(run) -> float:
    lines = [line["accuracy"] for line in history(run) if "accuracy" in line][:15]
    return sum(lines) / len(lines)


def reinforcement(seed: int) -> list[object]:
    words = [f"seed={seed}", f"model={fine_tuned(seed)[0]}", f"out={ROOT}/rl-{seed}", "show_every=0"]
    return ["rl", "experiment=tiny_rl", *words]


if __name__ == "__main__":
    main()
