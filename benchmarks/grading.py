"""How many answers are graded a second: right ones and their neighbours', boxed in prose, of five real benchmarks.

python -m benchmarks.grading            # two minutes on two cores; reads ../shared/data
"""

import json
import os
import platform
import time
from itertools import islice, product
from pathlib import Path

from dirl_cli.reward.grading import Grader
from dirl_cli.types import Problem

DATA = Path(__file__).parents[2] / "shared" / "data"
BENCHES = ("MATH500", "GSM8K", "AIME2024", "AIME2025", "OlympiadBench")
PROSE = (
    r"\boxed{{{0}}}",
    r"We substitute $x = 2$ and find $\boxed{{{0}}}$.",
    "Let me think step by step. " * 200 + r"First I thought \boxed{{7}}, but the answer is \[\boxed{{{0}}}.\]",
)


def main() -> None:
    cores = os.cpu_count() or 1
    print(f"{platform.processor() or platform.machine()}, {cores} cores, the processes' start included\n")
    print("| answers | processes | seconds | answers/s | right ones right | neighbours' wrong |")
    print("|--:|--:|--:|--:|--:|--:|")
    for count, workers in product((2_000, 10_000), sorted({1, 2, cores})):
        items, expected = answers(count)
        began = time.perf_counter()
        with Grader(workers) as grader:
            verdicts = dict(grader.grade(items))
        seconds = time.perf_counter() - began
        agreed = {
            kind: [verdicts[key] == kind for key in range(count) if expected[key] is kind] for kind in (True, False)
        }
        shares = " | ".join(f"{100 * sum(found) / len(found):.1f} %" for found in agreed.values())
        print(f"| {count:,} | {workers} | {seconds:.1f} | {count / seconds:,.0f} | {shares} |", flush=True)


def answers(count: int) -> tuple[list[tuple[int, Problem, str]], list[bool | None]]:
    """(key, problem, completion) of each, and whether it is right; None for a neighbour's whose text is the same."""
    golds = [row["ground_truth_answer"] for name in BENCHES for row in json.loads((DATA / f"{name}.json").read_text())]
    made = (
        (
            gold,
            PROSE[(i + turn) % len(PROSE)].format(given),
            True if given is gold else None if given == gold else False,
        )
        for turn in range(len(PROSE))
        for i, (gold, neighbour) in enumerate(zip(golds, golds[1:] + golds[:1], strict=True))
        for given in (gold, neighbour)
    )
    chosen = list(islice(made, count))
    return [(key, Problem("", "", gold), text) for key, (gold, text, _) in enumerate(chosen)], [
        right for _, _, right in chosen
    ]


if __name__ == "__main__":
    main()
