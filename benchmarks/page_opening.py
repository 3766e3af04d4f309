"""How long a page of `dirl view` takes to write, and to open in a headless Chromium until it can be used.

python -m benchmarks.page_opening          # a minute; apt-get install chromium chromium-driver
"""

import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from dirl_cli.rollout.storage import Record, rollout_path, write_rollout
from dirl_cli.types import Problem, Trajectory
from dirl_cli.viewer.answer_sources import read_source
from dirl_cli.viewer.html_page import page
from dirl_cli.viewer.payload import TokenReader, payload
from tests.helpers.browser import browser

GROUP, STEPS, TRIES = 8, 50, 5


class Numbers:
    """A tokenizer whose tokens are numbers, each of them a text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


def main() -> None:
    print("| answers | tokens each | page | written, CPU | usable after: median (worst) | main thread, CPU |")
    print("|--:|--:|--:|--:|--:|--:|")
    with browser() as window, TemporaryDirectory() as directory:
        window.resize(1400, 900)
        for answers, tokens in ((10_000, 100), (10_000, 500)):
            measure(window, Path(directory, str(tokens)), answers, tokens)


def measure(window, run: Path, answers: int, tokens: int) -> None:
    write_run(run, answers, tokens)
    began = time.process_time()
    text = page(payload([read_source(run, answers)], [TokenReader(Numbers())], "dirl view it"))
    written = time.process_time() - began
    file = run / "page.html"
    file.write_text(text)

    usable, busy = [], []
    window.devtools("Performance.enable", timeDomain="threadTicks")
    for _ in range(TRIES):
        before = seconds_busy(window)
        window.open(file)  # after an empty page
        usable.append(window.run("return Number(document.body.dataset.ready)") / 1000)
        after = seconds_busy(window)
        busy.append(after - before if after > before else after)  # a page in a process of its own counts anew
    print(
        f"| {answers:,} | {tokens} | {len(text) / 1e6:.1f} MB | {written:.1f} s | {sorted(usable)[TRIES // 2]:.2f} s"
        f" ({max(usable):.2f}) | {sorted(busy)[TRIES // 2]:.2f} s |",
        flush=True,
    )


def seconds_busy(window) -> float:
    """CPU seconds of the page's main thread so far."""
    metrics = window.devtools("Performance.getMetrics")["metrics"]
    return next(entry["value"] for entry in metrics if entry["name"] == "TaskDuration")


def write_run(run: Path, answers: int, tokens: int) -> None:
    """A run's rollouts with tokens, steps and log-probs drawn at random, which compress badly."""
    draw = random.Random(0)
    for step in range(STEPS):
        records = []
        for place in range(answers // STEPS):
            ids = [draw.randrange(2, 20_000) for _ in range(tokens)]
            steps = [draw.randrange(1, 5) for _ in ids]
            logprobs = [-draw.expovariate(3) for _ in ids]
            trajectory = Trajectory([1] * 40, ids, steps, logprobs, "length", tokens, tokens, 0, (0,), block_size=4)
            problem = Problem(f"sum-{step}-{place // GROUP}", "What is two plus two?", "four")
            right = draw.random() < 0.5
            records.append(Record(problem, place % GROUP, "four", trajectory, float(right), correct=right))
        write_rollout(rollout_path(run / "rollouts", step), records)


if __name__ == "__main__":
    main()
