"""What a large RL step costs one rank's host besides sampling and gradients, as it was and as it is.

python -m benchmarks.host_side 8 16           # both ways, by problems a step: about two minutes on one core
python -m benchmarks.host_side 128 --only now # the whole size, as it is: 3 GiB

Rank 0 of 8 at 32 answers of 8,192 tokens to each problem, blocks of 4 in two steps, DiPO. What is sent travels in
memory: what a network takes comes on top. The spans of the other ranks' groups are taken to be as this one's, and their
answers as they would come.
"""

import argparse
import gc
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.rl.advantages import AdvantageEstimator
from dirl_cli.rl.answer_strips import ALONE, AnswerSpan, Part
from dirl_cli.rl.batch import ObjectiveRows, TrajectoryGroup
from dirl_cli.rl.groups import Group, add_advantages
from dirl_cli.rl.rollout_metrics import records, rollout_metrics
from dirl_cli.rl.rollout_state import Rollout
from dirl_cli.rollout.arrays import with_arrays
from dirl_cli.rollout.storage import Record, write_rollout
from dirl_cli.types import Problem, Trajectory
from tests.helpers.algorithms import algorithm

RANKS, GROUP, PROMPT, ANSWER, BLOCK = 8, 32, 256, 7936, 4
VOCABULARY, STOP, MASK = 151_936, 151_645, 151_669
ROW_TOKENS, MICRO_ROWS = 32_768, 2
DIPO = algorithm("dipo")
WAYS = ("before", "now")
ON_PATH = ["exchange of answers", "advantages", "metrics", "rows"]  # the file is written in a thread now
REPOSITORY = Path(__file__).parents[1]
ADVANTAGES = AdvantageEstimator("normalised", float("inf"), 1.0, {})


def sampled_group(number: int) -> Group:
    """The answers to a problem, in lists as a sampler gives them; the last block of each ends it."""
    random = np.random.default_rng(number)
    prompt = random.integers(0, VOCABULARY // 2, PROMPT).tolist()
    problem = Problem(str(number), "question " * 20, "12")
    group = []
    for sample in range(GROUP):
        steps = random.random((ANSWER // BLOCK, BLOCK)).argsort(1) // 2 + 1
        token_ids = random.integers(0, VOCABULARY // 2, ANSWER)
        token_ids[-1] = STOP
        trajectory = Trajectory(
            prompt,
            token_ids.tolist(),
            steps.flatten().tolist(),
            np.log(random.random(ANSWER, np.float32)).tolist(),
            "stop",
            denoise_forwards=ANSWER // 2,
            forwards=ANSWER // 2 + ANSWER // BLOCK,
            stop_token_ids=(STOP,),
            block_size=BLOCK,
        )
        right = bool(random.random() < 0.5)
        text = "word " * (ANSWER * 4 // 5)  # four letters a token
        group.append(Record(problem, sample, text, trajectory, float(right), {"accuracy": float(right)}, right))
    return group


@dataclass
class Clock:
    """Seconds of this process's CPU by the name of a part."""

    seconds: dict[str, float]

    def __call__(self, part: str, work: Callable[[], Any]) -> Any:
        gc.collect()
        start = time.process_time()
        result = work()
        self.seconds[part] = time.process_time() - start
        return result


def exchanged(blobs: list[bytes], own: list[Group], pack: Callable[[Group], Group]) -> list[Group]:
    """All groups, from this rank's answers and what the others sent."""
    sent = pickle.dumps([pack(group) for group in own])
    groups = pickle.loads(sent)
    for blob in blobs:
        groups += pickle.loads(blob)
    return groups


def others_spans(groups: int) -> Callable[[list[AnswerSpan]], list[AnswerSpan]]:
    """Joins this rank's spans with those of the others, which are like them."""

    def gather(own: list[AnswerSpan]) -> list[AnswerSpan]:
        by_group: dict[int, list[AnswerSpan]] = {}
        for span in own:
            by_group.setdefault(span.group, []).append(span)
        pattern = next(iter(by_group.values()))
        spans = list(own)
        for group in set(range(groups)) - set(by_group):
            shift = (group - pattern[0].group) * GROUP
            spans += [replace(span, group=group, first=span.first + shift) for span in pattern]
        return spans

    return gather


def annotated(groups: list[Group]) -> list[TrajectoryGroup]:
    made = []
    for group in groups:
        advantages = [record.advantage or 0.0 for record in group]
        made.append(TrajectoryGroup([record.trajectory for record in group], advantages, [[]] * len(group)))
    return made


def objective_rows(groups: list[Group], part: Part) -> ObjectiveRows:
    spec = BlockSpec(BLOCK, MASK)
    return ObjectiveRows(annotated(groups), DIPO, spec, 0, ROW_TOKENS, True, torch.Generator().manual_seed(0), part)


def own_rows(groups: list[Group]) -> list[Rows]:
    """This rank's micro-batches, made alone."""
    rows = objective_rows(groups, Part(0, RANKS, others_spans(len(groups))))
    starts = range(0, len(rows.bins), MICRO_ROWS)[::RANKS]
    return [rows.rows(rows.bins[start : start + MICRO_ROWS]) for start in starts]


def all_rows(groups: list[Group]) -> list[Rows]:
    """Those of all ranks, made and split by each, which then takes its own."""
    rows = objective_rows(groups, ALONE)
    return rows.rows(rows.bins).split(MICRO_ROWS)[::RANKS]


def step(problems: int, now: bool, directory: Path) -> dict[str, float]:
    """CPU seconds of each part of a step's host side on rank 0."""
    own = [sampled_group(number) for number in range(problems // RANKS)]
    pack: Callable[[Group], Group] = with_arrays if now else list
    blobs = []
    for rank in range(1, RANKS):
        theirs = [sampled_group(rank * 1000 + number) for number in range(problems // RANKS)]
        blobs.append(pickle.dumps([pack(group) for group in theirs]))
        del theirs

    clock = Clock({})
    groups = clock("exchange of answers", partial(exchanged, blobs, own, pack))
    clock.seconds["bytes a token"] = sum(map(len, blobs)) / ((RANKS - 1) * len(own) * GROUP * ANSWER)
    del blobs, own
    groups = clock("advantages", partial(add_advantages, groups, ADVANTAGES))
    clock("metrics", lambda: rollout_metrics(Rollout(groups, groups, problems), GROUP))
    micro_batches = clock("rows", partial((own_rows if now else all_rows), groups))
    clock.seconds["scored tokens"] = sum(len(rows.targets) for rows in micro_batches)
    del micro_batches
    clock("file", lambda: write_rollout(directory / "step-000001.jsonl", records(groups, groups)))
    clock.seconds["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return clock.seconds


def measured(problems: int, now: bool) -> dict[str, float]:
    """The same, in a process of its own, whose peak of memory is its own too."""
    words = [sys.executable, "-m", "benchmarks.host_side", str(problems), "--alone", "now" if now else "before"]
    printed = subprocess.run(words, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    result: dict[str, float] = json.loads(printed)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=int, nargs="+", help=f"multiples of {RANKS}")
    parser.add_argument("--only", choices=WAYS, help="one of the two")
    parser.add_argument("--alone", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(step(args.problems[0], args.alone == "now", Path(directory))))
        return

    for problems in args.problems:
        print(f"\n{problems} problems, {problems * GROUP * (PROMPT + ANSWER) / 1e6:.1f} M tokens", flush=True)
        for way in [args.only] if args.only else WAYS:
            result = measured(problems, way == "now")
            on_path = ON_PATH if way == "now" else [*ON_PATH, "file"]
            total = sum(result[part] for part in on_path)
            told = " · ".join(f"{name} {value:,.2f}" for name, value in result.items())
            print(f"{way:6} {told} · what the step waits for {total:.2f} s", flush=True)


if __name__ == "__main__":
    main()
