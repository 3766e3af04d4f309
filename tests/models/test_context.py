"""Rows divided among processes: which tokens are whose, and the same numbers as in one process."""

import pytest
import torch

from dirl_cli.diffusion.layout import PADDING
from dirl_cli.errors import DirlError
from dirl_cli.models.context import ContextGroup, pad_rows, require_shared_heads
from tests.helpers.divided_rows import rows
from tests.helpers.processes import run_together
from tests.helpers.small import small_lm


def test_every_token_is_in_one_slice_and_found_there():
    token_ids = torch.arange(24).view(2, 12)
    index = torch.tensor([1, 4, 7, 8, 13, 23])
    whose = []
    for process in range(3):
        context = ContextGroup("", 3, process)
        own, place = context.own_tokens(index, width=12)
        assert torch.equal(context.slice_of(token_ids).flatten()[place], index[own])
        whose += own.tolist()
    assert sorted(whose) == list(range(6))


def test_padded_rows_score_the_same_tokens():
    packed = rows(45)
    padded = pad_rows(packed, 16)
    width = packed.token_ids.shape[1]
    assert width % 16 and padded.token_ids.shape[1] % 16 == 0
    assert (padded.strip[:, width:] == PADDING).all()
    assert torch.equal(padded.at_targets(padded.position), packed.at_targets(packed.position))
    before = padded.position.flatten()[padded.shifted_index]
    assert torch.equal(before, packed.position.flatten()[packed.shifted_index])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_log_probs_and_gradients_are_those_of_one_process(processes):
    run_together("tests.helpers.divided_rows", [[]] * processes, seconds=240)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_so_are_those_of_compiled_layers():
    run_together("tests.helpers.divided_rows", [["compiled"]] * 2, seconds=540)


def test_heads_that_cannot_be_divided_are_told_by_what_they_can():
    with pytest.raises(DirlError, match=r"the 4 heads of the model's attention.*: give one of 2, 4"):
        require_shared_heads(small_lm().model.config, 3)
