"""The questions of an evaluation, put to a sampler."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from dirl_cli.evaluation.answers import Run
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.types import Decoding, Trajectory


def sample(
    sampler: Sampler, prompts: Sequence[list[int]], runs: Sequence[Run], decoding: Decoding
) -> Iterator[tuple[int, int, Trajectory]]:
    """Sample the runs; an answer depends on its prompt and sample index, not on which others are missing.

    Problems with the same prompt get seeds of their own, so that their answers differ.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(decoding.seed + 1_000_003 * seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
    by_end: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        by_end[run.end].append(run)
    for end, group in by_end.items():
        wanted = [prompts[run.place] for run in group]
        first = [run.first for run in group]
        for i, number, trajectory in sampler.stream(
            wanted, end, decoding, first, seeds=[seeds[run.place] for run in group]
        ):
            yield group[i].place, number, trajectory
