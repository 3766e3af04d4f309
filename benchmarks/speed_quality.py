"""Speed against quality of a converted model: thresholds and block sizes beside the same model a token at a time.

scripts/smollm2.sh                              # makes the models, in runs/smollm2
python -m benchmarks.speed_quality [1 4 8 16]   # ten minutes, and a quarter of an hour a size but 4; killed, it goes on
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.experiment import at_once
from dirl_cli.evaluation.report import accuracy_text
from dirl_cli.evaluation.result_card import Evaluation, read_evaluation
from dirl_cli.report.plot import Point, scatter
from dirl_cli.text import with_digits

WORDS, ROOT = Path("runs/smollm2/words/model"), Path("runs/speed_quality")
THRESHOLDS = (0.5, 0.7, 0.9, 0.98)
PROBLEMS = ("bench=arithmetic", "limit=200", "dtype=bfloat16")
A_TOKEN_AT_A_TIME = ("model.block_size=1", "decoding=sequential")


def main(sizes: Sequence[int]) -> None:
    at_once(tuned(sizes))
    commands = dict(evaluations(sizes))
    at_once([*words, f"out={home(name)}"] for name, words in commands.items())
    found = {name: read_evaluation(home(name)) for name in commands}
    print("| | accuracy % | tok/fwd | tok/s | length |\n|---|--:|--:|--:|--:|")
    for name, evaluation in found.items():
        print(f"| {name} | {' | '.join(cells(evaluation))} |")
    scatter(series(found), "SmolLM2-135M on word problems, by threshold", "tokens per forward", ROOT / "plot.png")


def model(size: int) -> Path:
    return WORDS if size == 4 else ROOT / f"blocks-of-{size}/model"


def tuned(sizes: Sequence[int]) -> Iterator[list[object]]:
    """The demonstrations that blocks of four had, for the causal model and for the converted one in larger blocks."""
    for size in sizes:
        if model(size) != WORDS:
            of = ["model=smollm2"] if size == 1 else []
            words = [*of, f"model.block_size={size}", "eval_every=0", "eval_problems=0"]
            yield ["sft", "experiment=smollm2_words", *words, f"out={model(size).parent}"]


def evaluations(sizes: Sequence[int]) -> Iterator[tuple[str, list[object]]]:
    """The command of each evaluation by its name in the table."""
    evaluate = ["eval", *PROBLEMS]
    yield "the original, a token at a time", [*evaluate, "model=smollm2", *A_TOKEN_AT_A_TIME, "instruction=boxed"]
    for size in sizes:
        if size == 1:
            yield "tuned, a token at a time", [*evaluate, f"model={model(1)}", *A_TOKEN_AT_A_TIME]
            continue
        of_size = [*evaluate, f"model={model(size)}"]
        yield f"blocks of {size}, a token at a time", [*of_size, "decoding=static"]
        for threshold in THRESHOLDS:
            yield f"blocks of {size}, threshold {threshold:g}", [*of_size, f"decoding.threshold={threshold:g}"]


def home(name: str) -> Path:
    """The directory of an evaluation."""
    return ROOT / "eval" / name.replace(",", "").replace(" ", "-")


def cells(evaluation: Evaluation) -> list[str]:
    metrics = evaluation.metrics
    speeds = (
        with_digits(metrics.tokens_per_forward, 2),
        with_digits(metrics.tokens_per_second, 0),
        with_digits(metrics.length, 0),
    )
    return [accuracy_text(metrics), *speeds]


def series(found: Mapping[str, Evaluation]) -> dict[str, list[Point]]:
    """The points of each model: tokens per forward, accuracy, its standard error and a label."""
    lines: dict[str, list[Point]] = {}
    for name, evaluation in found.items():
        of, _, setting = name.partition(", ")
        metrics = evaluation.metrics
        label = setting.removeprefix("threshold ")
        point = metrics.tokens_per_forward or 0.0, metrics.accuracy, metrics.standard_error or 0.0, label
        lines.setdefault(of, []).append(point)
    return {name: sorted(points) for name, points in lines.items()}


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [1, 4, 8, 16])
