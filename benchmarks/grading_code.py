"""How many answers that are programs are graded a second, while the processes that grade them are killed.

python -m benchmarks.grading_code            # 5,000 answers to HumanEval, right, broken and hostile; some minutes
"""

import os
import platform
import random
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import psutil

from dirl_cli.data.human_eval import HumanEval
from dirl_cli.reward.grading import Grader
from dirl_cli.types import Problem

ANSWERS = 5_000
SECONDS = 5.0  # of an answer: dirl eval's own limit
KILLS = 10
HOSTILE = (  # one of ten answers is one of these
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: break\n",
    "import os\nos._exit(0)\n",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n",
    "x = bytearray(10 ** 10)\n",
    "def f(): return f()\nf()\n",
)
HANGING = ("while True: pass\n", "import time\ntime.sleep(1e6)\n")
HANGS = 125  # one of so many answers hangs


def answers(count: int) -> tuple[list[tuple[int, Problem, str]], list[bool]]:
    """(key, problem, completion) of each, in a random order that is always the same, and whether it is right."""
    problems = HumanEval("humaneval").problems()
    rng = random.Random(0)
    items: list[tuple[int, Problem, str]] = []
    right = []
    for key in range(count):
        problem = problems[key % len(problems)]
        kind = rng.random()
        if key % HANGS == 0:
            text = rng.choice(HANGING)
        elif kind < 0.1:
            text = rng.choice(HOSTILE)
        elif kind < 0.5:
            text = problem.question + "    return None\n"
        else:
            text = problem.answer
        items.append((key, problem, f"```python\n{text}```"))
        right.append(text == problem.answer)
    return items, right


def run(count: int, workers: int, kills: int) -> tuple[float, dict[int, float], int]:
    """The seconds that grading took, the credits, and how many processes were killed on the way, `kills` at most."""
    items, _ = answers(count)
    with Grader(workers, SECONDS) as grader:
        stop = threading.Event()
        killed: list[int] = []
        killer = threading.Thread(target=kill_some, args=(kills, stop, killed))
        began = time.perf_counter()
        killer.start()
        credits = {int(str(key)): credit for key, credit in grader.grade(items)}
        seconds = time.perf_counter() - began
        stop.set()
        killer.join()
    return seconds, credits, len(killed)


def kill_some(kills: int, stop: threading.Event, killed: list[int]) -> None:
    """Kill a grading process, or what it runs programs with, every few seconds."""
    rng = random.Random(1)
    while len(killed) < kills and not stop.wait(rng.uniform(2, 6)):
        running = [child for child in psutil.Process().children(recursive=True) if is_ours(child)]
        if running:
            process = rng.choice(running)
            with suppress(psutil.NoSuchProcess):
                process.kill()
                killed.append(process.pid)


def is_ours(process: psutil.Process) -> bool:
    """Whether a process grades or runs programs; the one that all are forked from, and its tracker, are left alone."""
    try:
        return process.ppid() != os.getpid() and "resource_tracker" not in " ".join(process.cmdline())
    except psutil.Error:
        return False


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| answers | processes | killed | seconds | answers/s | right ones right | wrong ones wrong | left running |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else ANSWERS
    _, right = answers(count)
    for workers, kills in ((1, 0), (2, 0), (2, KILLS)):
        seconds, credits, killed = run(count, workers, kills)
        agreed = Counter((right[key], (credit == 1) == right[key]) for key, credit in credits.items())
        shares = [f"{agreed[kind, True]} of {agreed[kind, True] + agreed[kind, False]}" for kind in (True, False)]
        left = [child for child in psutil.Process().children(recursive=True) if is_ours(child)]
        cells = [f"{count:,}", workers, killed, f"{seconds:.0f}", f"{count / seconds:.0f}", *shares, len(left)]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
