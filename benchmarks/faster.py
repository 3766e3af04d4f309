"""Fewer forwards from the embedded model: each means of training for speed, and together, in blocks of 4, 8 and 16.

python -m benchmarks.faster           # hours on two cores; continues where it was stopped
python -m benchmarks.faster 8         # blocks of one size

Each seed starts with the fine-tuned and reinforced model of `benchmarks.learning`, in blocks of 4, and learns from its
own right answers. All are measured on problems that training never saw, over a sweep of thresholds.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.experiment import ROOT, SEEDS, at_once, fine_tuned, mean_and_error, percent
from benchmarks.learning import reinforcement
from dirl_cli.data.arithmetic import Arithmetic
from dirl_cli.evaluation.aup import ALLOWED_LOSS, Speed, curve_of
from dirl_cli.report.plot import style

SIZES = (4, 8, 16)
THRESHOLDS = "0.5,0.7,0.9,0.95,0.98"
ASKED = 200  # problems whose answers' order is compared
QUESTIONS = ROOT / "faster-questions.jsonl"


class Method(NamedTuple):
    """What is added to fine-tuning on own answers, and to reinforcement, where it goes on from there."""

    tuning: list[str]
    reinforcement: list[str] | None = None


CERTAIN = ["certainty=2"]
GROWN = ["annealing.share=0.6"]  # through the sizes that come before
ONE_STEP = ["masking=trace", "masking.window=16"]  # no block has more steps
SPEED = ["reward=speed_rank", "rl.filter=reward"]
METHODS = {
    "masked at random": Method([]),
    "… and certain": Method(CERTAIN),
    "… and grown": Method(GROWN),
    "… then reinforced": Method([], ["reward=accuracy"]),
    "… then reinforced for speed": Method([], SPEED),
    "a block, one step": Method(ONE_STEP),
    "together": Method([*ONE_STEP, *CERTAIN], SPEED),
}
SMALLER = {4: [], 8: [4], 16: [4, 8]}  # the sizes that blocks grow through


class Setting(NamedTuple):
    """A threshold's outcome. accuracy, error: shares of 1. tpf: tokens before the stop token per forward."""

    threshold: float
    accuracy: float
    error: float
    tpf: float


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or list(SIZES)
    models = [(size, name) for size in sizes for name in METHODS if SMALLER[size] or name != "… and grown"]
    make(models)
    print("| blocks of | own answers | TPF as accurate as the start | most accurate % | TPF then | AUP | order |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    starts = [start(seed) for seed in SEEDS]
    print(f"| 4 | none: the start | {' | '.join(cells(starts, starts))} | |")
    for size, name in models:
        group = [trained(size, name, seed) for seed in SEEDS]
        order = [agreement(start(seed), model, size) for seed, model in zip(SEEDS, group, strict=True)]
        shown = "" if None in order else mean_and_error(order, 2)
        print(f"| {size} | {name} | {' | '.join(cells(group, starts))} | {shown} |")
    for size in sizes:
        draw(size, [name for of, name in models if of == size])


def make(models: Sequence[tuple[int, str]]) -> None:
    """Run what is not there yet: training, sweeps of thresholds, and answers a token at a time."""
    at_once(fine_tuned(seed)[1] for seed in SEEDS)
    at_once(reinforcement(seed) for seed in SEEDS)
    at_once(own_answers(seed) for seed in SEEDS)
    tunings = {home(size, METHODS[name].tuning, seed): tuning(size, METHODS[name], seed)
               for size, name in models for seed in SEEDS}  # fmt: skip
    at_once(tunings.values())
    at_once(
        reinforcing(size, METHODS[name], seed)
        for size, name in models
        for seed in SEEDS
        if METHODS[name].reinforcement is not None
    )
    made = [start(seed) for seed in SEEDS] + [trained(size, name, seed) for size, name in models for seed in SEEDS]
    at_once(sweep(model) for model in made)
    write_questions()
    at_once(one_at_a_time(model) for model in made)


def start(seed: int) -> Path:
    """The model that all of a seed begin with, in blocks of 4."""
    return ROOT / f"rl-{seed}" / "model"


def sampled(seed: int) -> Path:
    return ROOT / f"faster-answers-{seed}"


def trained(size: int, name: str, seed: int) -> Path:
    method = METHODS[name]
    words = [*method.tuning, *(method.reinforcement or [])]
    return home(size, words, seed) / "model"


def home(size: int, words: Sequence[str], seed: int) -> Path:
    """The directory of a run, by what sets it apart."""
    return ROOT / "-".join(["faster", str(size), *words, str(seed)])


def own_answers(seed: int) -> list[object]:
    """Two answers to each of 20,000 training problems, of which training takes the faster right one."""
    draws = ["rl.rollout_only=true", "rl.filter=none", "rl.problems=256", "rl.group_size=2", "steps=80"]
    quiet = ["show_every=0", "eval_problems=0"]
    return ["rl", "experiment=tiny_rl", *draws, *quiet, f"seed={seed}", f"model={start(seed)}", f"out={sampled(seed)}"]


def tuning(size: int, method: Method, seed: int) -> list[object]:
    words = list(method.tuning)
    if method.tuning == GROWN:
        words.append(f"annealing.block_sizes={SMALLER[size]}".replace(" ", ""))
    data = ["data=rollouts", f"data.path={sampled(seed)}", "data.fastest=1"]
    steps = ["steps=1000", "optim.lr=0.01", "eval_every=0", "eval_problems=0"]
    return ["sft", "experiment=tiny_sft", f"model={start(seed)}", f"model.block_size={size}", *data, *steps, *words,
            f"seed={seed}", f"out={home(size, method.tuning, seed)}"]  # fmt: skip


def reinforcing(size: int, method: Method, seed: int) -> list[object]:
    begin = home(size, method.tuning, seed) / "model"
    words = method.reinforcement or []
    steps = ["steps=60", "optim.lr=5e-5", "eval_problems=0", "show_every=0"]
    return ["rl", "experiment=tiny_rl", f"model={begin}", *steps, *words,
            f"seed={seed}", f"out={home(size, [*method.tuning, *words], seed)}"]  # fmt: skip


def sweep(model: Path, *words: str) -> list[object]:
    return ["eval", "-m", "bench=arithmetic", f"model={model}", f"decoding.threshold={THRESHOLDS}",
            f"out={measured(model)}", *words]  # fmt: skip


def measured(model: Path) -> Path:
    return ROOT / "eval" / f"{model.parent.name}-thresholds"


def settings(model: Path) -> list[Setting]:
    """What a sweep found, the slowest first."""
    (file,) = measured(model).glob("*.csv")
    with file.open() as lines:
        rows = [
            Setting(*(float(row[name]) for name in ("decoding.threshold", "accuracy", "standard_error", "tpf")))
            for row in csv.DictReader(lines)
        ]
    return sorted(rows, key=lambda row: row.tpf)


def cells(models: Sequence[Path], starts: Sequence[Path]) -> list[str]:
    """A row of the table, over seeds, each beside the model that it started with."""
    found = [settings(model) for model in models]
    before = [settings(model) for model in starts]
    fastest = [as_accurate(*pair) for pair in zip(found, before, strict=True)]
    reached = [one.tpf for one in fastest if one]
    if len(reached) == len(models):
        speed = mean_and_error(reached, 2)
    else:
        speed = f"{len(reached)} of {len(models)} seeds: {', '.join(f'{tpf:.2f}' for tpf in reached)}".rstrip(": ")
    best = [max(some, key=lambda one: one.accuracy) for some in found]
    return [
        speed,
        percent([one.accuracy for one in best]),
        mean_and_error([one.tpf for one in best], 2),
        mean_and_error([area(*pair) for pair in zip(found, before, strict=True)], 0),
    ]


def as_accurate(found: Sequence[Setting], of_start: Sequence[Setting]) -> Setting | None:
    """The fastest setting that is within a standard error of the start at its threshold of 0.9, if there is one."""
    (before,) = [one for one in of_start if one.threshold == 0.9]
    close = [one for one in found if one.accuracy >= before.accuracy - before.error]
    return max(close, key=lambda one: one.tpf) if close else None


def area(found: Sequence[Setting], of_start: Sequence[Setting]) -> float:
    """AUP over the settings that lose at most 5 points; the best accuracy is the start's."""
    kept = [one for one in found if one.accuracy >= found[0].accuracy - ALLOWED_LOSS / 100]
    best = max(one.accuracy for one in of_start)
    area = curve_of([Speed(one.tpf, 100 * one.accuracy) for one in kept], 100 * best).area
    assert area is not None  # what it is refused for is not kept
    return area


def write_questions() -> None:
    problems = Arithmetic().problems()[:ASKED]
    QUESTIONS.write_text("".join(json.dumps({"question": problem.question}) + "\n" for problem in problems))


def one_at_a_time(model: Path) -> list[object]:
    """Answers whose tokens are revealed one after another, so that all have an order."""
    return ["generate", f"model={model}", f"input={QUESTIONS}", "decoding=static", "decoding.max_new_tokens=64",
            f"out={ordered(model)}"]  # fmt: skip


def ordered(model: Path) -> Path:
    return ROOT / "generate" / f"{model.parent.name}-order"


def agreement(before: Path, after: Path, size: int) -> float | None:
    """Mean rank correlation (Spearman's) of two models' orders within blocks, where they gave the same answer.

    None where they gave none.
    """
    correlations = []
    for one, other in zip(answers(before), answers(after), strict=True):
        if one["token_ids"] != other["token_ids"]:
            continue
        first, second = order_of(one), order_of(other)
        for low in range(0, len(first) - size + 1, size):  # whole blocks alone
            correlations.append(spearman(first[low : low + size], second[low : low + size]))
    return mean(correlations) if correlations else None


def answers(model: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ordered(model) / "completions.jsonl").read_text().splitlines()]


def order_of(answer: dict[str, Any]) -> Tensor:
    """When each token was revealed, over all blocks: (n,)."""
    steps = torch.tensor(answer["reveal_step"])
    block = torch.arange(len(steps)) // answer["block_size"]
    return block * (int(steps.max()) + 1) + steps


def spearman(first: Tensor, second: Tensor) -> float:
    """Of two orders without ties: the correlation of their ranks."""
    ranks = torch.stack([first.argsort().argsort(), second.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def draw(size: int, names: Sequence[str]) -> None:
    """Accuracy over tokens per forward, each threshold the mean over seeds."""
    curves = {"the start, in blocks of 4": [settings(start(seed)) for seed in SEEDS]}
    for name in names:
        curves[name] = [settings(trained(size, name, seed)) for seed in SEEDS]
    title = f"blocks of {size}, thresholds {THRESHOLDS}, mean of {len(SEEDS)} seeds"
    plot(curves, title, f"faster_{size}.png")


def plot(curves: dict[str, list[list[Setting]]], title: str, file: str) -> None:
    """One line a model, each of its settings the mean over the sweeps of its seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for (name, seeds), color in zip(curves.items(), colormaps["Dark2"].colors, strict=False):
        by_threshold = list(zip(*[sorted(found) for found in seeds], strict=True))
        tpf = [mean(one.tpf for one in group) for group in by_threshold]
        accuracy = [mean(one.accuracy for one in group) for group in by_threshold]
        axes.plot(tpf, accuracy, color=color, marker="o", markersize=4, linewidth=1.5, label=name)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    style(axes, title, "TPF", legend=True)
    figure.savefig(Path(__file__).parent / file, dpi=120)


if __name__ == "__main__":
    main()
