"""The questions of an evaluation, put to a sampler."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from dirl_cli.evaluation.answers import SampleRange
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.types import Decoding, Trajectory


def sample(
    sampler: Sampler, prompts: Sequence[list[int]], ranges: Sequence[SampleRange], decoding: Decoding
) -> Iterator[tuple[int, int, Trajectory]]:
    """Sample the ranges; yields (problem index, sample index, trajectory) as they end.

    An answer depends on its prompt and sample index, not on which others are missing. Problems with
    the same prompt get seeds of their own, so that their answers differ.
    """
    repetitions: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(decoding.seed + 1_000_003 * repetitions[tuple(prompt)])
        repetitions[tuple(prompt)] += 1

    # A sampler takes a first sample index for each prompt, but one end for all of them.
    by_end: dict[int, list[SampleRange]] = defaultdict(list)
    for missing in ranges:
        by_end[missing.end].append(missing)
    for end, group in by_end.items():
        group_prompts = [prompts[missing.problem_index] for missing in group]
        first = [missing.first for missing in group]
        group_seeds = [seeds[missing.problem_index] for missing in group]
        for i, sample_index, trajectory in sampler.stream(group_prompts, end, decoding, first, seeds=group_seeds):
            yield group[i].problem_index, sample_index, trajectory
