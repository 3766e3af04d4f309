"""Each process lays out its share of a step's answers, and makes the very rows that one process would."""

from dataclasses import fields
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dirl_cli.diffusion.layout import Rows, join_strips, pack
from dirl_cli.models.context import UNDIVIDED
from dirl_cli.rl.answer_strips import AnswerStrips, Part, all_spans
from dirl_cli.rl.batch import ObjectiveRows, TrajectoryGroup
from dirl_cli.training.trainer import Trainer
from tests.helpers.algorithms import algorithm
from tests.helpers.answers import ANSWERS, BLOCK, HINTED, REWARDS, TOKENS
from tests.helpers.small import PAD
from tests.helpers.whole_batch import objective_rows

GROUPS = [TrajectoryGroup(a, r) for a, r in zip(ANSWERS + HINTED, REWARDS + REWARDS, strict=True)]
RANDOM_VIEWS = ["unigrpo", "coupled_masks", "agrpo"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def trainer(index: int, count: int) -> Trainer:
    """One that only shares out."""
    one = Trainer.__new__(Trainer)
    one.accelerator = SimpleNamespace(process_index=index, num_processes=count)
    one.context = UNDIVIDED
    one.groups = count
    return one


def gathered_spans(name: str, row_tokens: int, processes: int) -> list:
    """The spans of all processes, each of which lays out its share alone."""
    spans = []
    for index in range(processes):
        strips = AnswerStrips(
            [group.trajectories for group in GROUPS], algorithm(name).views, TOKENS, row_tokens, generator()
        )
        spans += all_spans(strips, Part(index, processes, lambda own: own))
    return spans


def assert_same_rows(ours: Rows, theirs: Rows) -> None:
    for field in fields(Rows):
        value, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(value, Tensor):
            assert torch.equal(value, other), field.name
    assert ours.extras.keys() == theirs.extras.keys()
    for name, extra in ours.extras.items():
        assert torch.equal(extra, theirs.extras[name]), name


@pytest.mark.parametrize("micro_rows", [None, 1, 2])
@pytest.mark.parametrize("row_tokens", [1, 40, 96])
@pytest.mark.parametrize("name", ["dipo", *RANDOM_VIEWS])
@pytest.mark.parametrize("processes", [1, 2, 3, 40])  # of 40 most have nothing of their own
def test_what_processes_make_apart_is_what_one_makes_and_splits(name, row_tokens, micro_rows, processes):
    whole, lengths = objective_rows(GROUPS, algorithm(name), TOKENS, PAD, row_tokens, True, generator())
    spans = gathered_spans(name, row_tokens, processes)
    computed = set()
    for index in range(processes):
        part = Part(index, processes, lambda own: spans)
        rows = ObjectiveRows(GROUPS, algorithm(name), TOKENS, PAD, row_tokens, True, generator(), part)
        assert (rows.lengths, rows.num_tokens, rows.num_scored) == (lengths, whole.num_tokens, len(whole.targets))
        ours = trainer(index, processes)
        expected = ours.cut(whole, micro_rows)
        each = ours.rows_each(len(rows.bins), micro_rows)
        for i, counts in ours.turns(len(expected)):
            assert_same_rows(rows.rows(rows.bins[i * each : (i + 1) * each]), expected[i])
            if counts:
                computed.add(i)
    assert computed == set(range(len(expected)))


def test_a_process_lays_out_its_share_of_the_groups_and_then_its_own_rows():
    calls = []

    def views(trajectory, *rest):
        calls.append(trajectory)
        return algorithm("dipo").views(trajectory, *rest)

    spans = gathered_spans("dipo", 40, 4)
    strips = AnswerStrips([group.trajectories for group in GROUPS], views, TOKENS, 40, generator())
    own: list = []
    all_spans(strips, Part(1, 4, lambda spans: own.extend(spans) or spans))
    assert 0 < len(calls) == sum(span.count for span in own) < len(strips.trajectories) / 2
    strips.strip(own[0])  # which it has already
    assert len(calls) == sum(span.count for span in own)
    other = next(span for span in spans if span not in own)
    strips.strip(other)
    assert len(calls) == sum(span.count for span in own) + other.count


def test_the_runs_are_packed_as_all_strips_laid_out_by_hand_are():
    """The slow definition: every answer laid out, answers of a group joined, all of them packed."""
    views = algorithm("dipo").views
    strips = []
    for group in GROUPS:
        strips.append(join_strips([views(answer, TOKENS, generator()) for answer in group.trajectories], BLOCK))
    rows, _ = objective_rows(GROUPS, algorithm("dipo"), TOKENS, PAD, 1000, True, generator())
    by_hand = pack(strips, 1000, BLOCK, PAD)
    for name in ("token_ids", "strip", "sequence", "position", "view", "target_index", "shifted_index", "targets"):
        assert torch.equal(getattr(rows, name), getattr(by_hand, name)), name
    answers = list(chain.from_iterable(group.trajectories for group in GROUPS))
    assert int(rows.extras["sample"].max()) == len(answers) - 1
