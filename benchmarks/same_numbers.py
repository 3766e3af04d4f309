"""Whether several processes learn what one does: five fp32 steps of SFT and of DiPO, on CPU processes over gloo.

python -m benchmarks.same_numbers    # a markdown table; minutes
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from tests.helpers.steps import among, differences, take

TASKS = {"sft": "SFT", "rl": "DiPO"}


def row(launch: str, processes: int, micro_rows: int, apart: dict[str, dict[str, float]]) -> str:
    values = [f"{apart[task][name]:.0e}" for task in TASKS for name in ("loss", "grad_norm", "parameters")]
    return f"| {launch} | {processes} | {micro_rows} | {' | '.join(values)} |"


def main() -> None:
    alone = {task: take(task) for task in TASKS}
    print(
        "| launch | processes | rows a micro-batch |",
        " | ".join(f"{name}: loss | norm | parameters" for name in TASKS.values()),
        "|",
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for rows in (1, 2):
        cut = {task: take(task, micro_rows=rows) for task in TASKS}
        print(row("single", 1, rows, {task: differences(alone[task], cut[task]) for task in TASKS}), flush=True)
    for launch in ("ddp", "fsdp2", "zero2"):
        for processes in (2, 4):
            for rows in (1, 2):
                with TemporaryDirectory() as directory:
                    found = among(processes, Path(directory), launch, micro_rows=rows)
                worst = {
                    task: max(
                        (differences(alone[task], one[task]) for one in found), key=lambda apart: max(apart.values())
                    )
                    for task in TASKS
                }
                print(row(launch, processes, rows, worst), flush=True)


if __name__ == "__main__":
    main()
