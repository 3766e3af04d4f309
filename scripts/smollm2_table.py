"""What scripts/smollm2.sh measured, in Markdown and one picture: python scripts/smollm2_table.py runs/smollm2"""

import json
import sys
from pathlib import Path

from dirl_cli.evaluation.compare import Difference, common_problems, compare
from dirl_cli.evaluation.report import accuracy_text, percent, with_digits
from dirl_cli.evaluation.result_card import Evaluation, read_evaluation
from dirl_cli.files import writing
from dirl_cli.report.metrics_log import read_metrics
from dirl_cli.report.plot import Panel, draw_panel
from dirl_cli.sft.validation import metric

STAGES = {  # and its evaluations on both tasks
    "SmolLM2, a token at a time": ("causal-gsm8k", "causal-words"),
    "in blocks of 4": ("converted-gsm8k", "converted-words"),
    "tuned on worked word problems": (None, "words"),
    "and on others, mostly not worked": (None, "mixed"),
    "and reinforced": (None, "words-rl"),
    "in blocks of 4, reinforced on GSM8K": ("gsm8k-rl", None),
}
GAINS = {"word problems": ("mixed", "words-rl"), "GSM8K": ("converted-gsm8k", "gsm8k-rl")}
TUNED = {"to blocks of 4": "converted", "on word problems": "words"}
SHOWN = 240  # characters of an answer
RATES = {metric(rate): f"{rate:.0%} hidden" for rate in (0.25, 0.5, 0.75, 1.0)}


def main(root: Path) -> None:
    found = {name: read_evaluation(root / "eval" / name) for pair in STAGES.values() for name in pair if name}
    print("| | GSM8K % | tok/fwd | length | word problems % | tok/fwd | length |\n|---|--:|--:|--:|--:|--:|--:|")
    for stage, names in STAGES.items():
        print(f"| {stage} | {' | '.join(cell for name in names for cell in cells(found.get(name)))} |")
    print()
    for task, (before, after) in GAINS.items():
        a, b = found[before], found[after]
        gain = dict(compare(a, b, common_problems(a, b)))["accuracy %"]
        print(f"Reinforced on {task}: {gained(gain)}")
    print(f"\n| denoising accuracy %, of hidden tokens | {' | '.join(RATES.values())} |")
    print("|---|--:|--:|--:|--:|")
    for name, run in TUNED.items():
        lines = [line for line in read_metrics(root / run / "metrics.jsonl") if RATES.keys() <= line.keys()]
        for line, when in ((lines[0], "before"), (lines[-1], "after")):
            shares = (percent(line[rate]) for rate in RATES)
            print(f"| {when} tuning {name} | {' | '.join(shares)} |")
    for name, evaluation in found.items():
        print(f"\n{name}: {said(evaluation)}")
    picture(root)


def gained(gain: Difference) -> str:
    """Such as: 31.0 → 42.5 %, 2.3 standard errors."""
    points = f"{gain.a:.1f} → {gain.b:.1f} %"
    return f"{points}." if gain.z is None else f"{points}, {gain.z:.1f} standard errors."


def cells(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return ["", "", ""]
    metrics = evaluation.metrics
    return [accuracy_text(metrics), with_digits(metrics.tokens_per_forward, 2), with_digits(metrics.length, 0)]


def said(evaluation: Evaluation) -> str:
    """The answer to the first problem."""
    first = min(evaluation.answers, key=lambda answer: (len(answer.problem), answer.problem))
    text = first.text if len(first.text) <= SHOWN else f"{first.text[:SHOWN]} …"
    return f"{first.problem}, {'right' if first.correct else 'wrong'}: {json.dumps(text, ensure_ascii=False)}"


def picture(root: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 3)
    losses = {"loss": "training", "validation_loss": "validation"}
    for row, (name, run) in zip(axes, TUNED.items(), strict=True):
        history = read_metrics(root / run / "metrics.jsonl")
        draw_panel(row[0], Panel(f"Loss, {name}", losses, log=True), history)
        draw_panel(row[1], Panel(f"Denoising accuracy, {name}", RATES, percent=True), history)
    rewarded = {"accuracy": "rollouts", "greedy_accuracy": "greedy, held out"}
    for row, (name, run) in zip(axes, {"word problems": "words-rl", "GSM8K": "gsm8k-rl"}.items(), strict=True):
        draw_panel(row[2], Panel(f"DiPO on {name}", rewarded, percent=True), read_metrics(root / run / "metrics.jsonl"))
    with writing(root / "curves.png"):
        figure.savefig(root / "curves.png", dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
