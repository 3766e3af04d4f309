"""Choosing masked tokens and revealing drawn ones by the Triton kernels: what plain operations do."""

import copy
import os
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is first imported
pytest.importorskip("triton")

from dirl_cli.diffusion import kernels  # noqa: E402
from dirl_cli.diffusion.sampling import draw_fused  # noqa: E402
from dirl_cli.diffusion.unmasking import BUILT_IN, FUSED  # noqa: E402
from dirl_cli.models.load import DiffusionLM  # noqa: E402
from dirl_cli.rollout import scheduler, unmask_triton  # noqa: E402
from dirl_cli.rollout import sequences as sequences_module  # noqa: E402
from dirl_cli.rollout.native import NativeSampler  # noqa: E402
from dirl_cli.rollout.sequences import SequenceState, Unmasker  # noqa: E402
from dirl_cli.types import Decoding  # noqa: E402
from tests.helpers.gpu_targets import compile_for  # noqa: E402
from tests.helpers.small import small_lm  # noqa: E402
from tests.rollout.test_decoder import Kernels  # noqa: E402

HIDDEN = 12
DISTINCT = torch.randn(HIDDEN, 50, generator=torch.Generator().manual_seed(5))


def on_device(block_size: int) -> DiffusionLM:
    lm = small_lm(block_size)
    lm.model.to(DEVICE)
    return lm


def some_sequences(lm: DiffusionLM) -> tuple[SequenceState, torch.Tensor]:
    """Four slots, three of them with blocks in which some tokens are given, some held and some revealed earlier."""
    sequences = SequenceState(lm, 4, 48, record_entropy=True)
    sequences.open(0, [5, 6, 7], {})
    sequences.open(1, [9] * 16, {2: 8, 5: 6})
    sequences.open(2, [3] * 9, {})
    sequences.send_opened()
    sequences.revealed_at[2, 10] = 1
    size = lm.block_size
    starts = [3 // size * size, 16 // size * size, 9 // size * size, 0]  # nothing is masked in the last, the spare slot
    fields = [[0, 1, 2, 3], starts, [1, 1, 2, 1], [11, 12, 13, 0]]
    return sequences, torch.tensor(fields, device=DEVICE).T.contiguous().T  # a block's fields may lie side by side


@pytest.mark.parametrize("block_size", [1, 4, 6, 16])
@pytest.mark.parametrize("strategy", BUILT_IN)
@pytest.mark.parametrize("steps", [None, 3])
def test_they_reveal_what_plain_operations_do(strategy, block_size, steps, monkeypatch):
    monkeypatch.setattr(unmask_triton, "TILE", 8)  # several steps
    lm = on_device(block_size)
    head = lambda hidden: hidden @ DISTINCT.to(hidden.device)  # noqa: E731
    hidden = torch.randn(4 * block_size, HIDDEN, generator=torch.Generator().manual_seed(block_size)).to(DEVICE)
    bounds = {
        "entropy_bounded": (0.0, 3.0, 100.0),
        "low_confidence_dynamic": (0.0, 0.3, 1.0),
        "probability_margin": (0.0, 0.3, 1.0),
        "bounded_adaptive": (0.1, 0.4, 1.0),
    }
    schedules = [{"threshold": threshold} for threshold in bounds.get(strategy, (0.5,))]
    if strategy == "low_confidence_dynamic":
        schedules.append({"threshold": 0.4, "threshold_by_step": -0.3, "threshold_by_position": 0.3})
    for schedule in schedules:
        decoding = Decoding(
            strategy=strategy,
            lowest_threshold=0.1,
            denoising_steps=steps,
            temperature=1.0,
            confidence="max",
            **schedule,
        )
        sequences, blocks = some_sequences(lm)
        others = copy.deepcopy(sequences)
        masked = int(
            (sequences.revealed_at[blocks[0][:, None], blocks[1][:, None] + torch.arange(block_size)] == 0).sum()
        )
        for step in range(1, block_size + 1):
            blocks[2] = step
            count = max(masked, 1) + 3  # more than there are, as from a graph
            ours, theirs = (
                Unmasker(lm, decoding, head, is_fused)(each, blocks, hidden, count)
                for each, is_fused in ((sequences, True), (others, False))
            )
            assert ours.tolist() == theirs.tolist()
            for name in ("tokens", "revealed_at"):
                assert torch.equal(getattr(sequences, name), getattr(others, name)), name
            for name in ("logprobs", "confidences", "entropies"):
                torch.testing.assert_close(getattr(sequences, name), getattr(others, name), atol=1e-5, rtol=1e-5)
            if (ours >= 0).all():
                break
        assert (ours >= 0).all()


def test_kernels_are_taken_for_the_strategies_that_they_have_only(monkeypatch):
    assert set(unmask_triton.STRATEGIES) == FUSED <= set(BUILT_IN)
    monkeypatch.setitem(BUILT_IN, "another", BUILT_IN["sequential"])
    assert not Unmasker(on_device(4), Decoding(strategy="another"), lambda hidden: hidden, is_fused=True).is_fused


def test_equal_confidences_are_revealed_from_the_left():
    lm = on_device(4)
    sequences, blocks = some_sequences(lm)
    head = lambda hidden: torch.zeros(len(hidden), 50, device=hidden.device)  # noqa: E731
    decoding = Decoding(strategy="low_confidence_static", denoising_steps=2)
    hidden = torch.zeros(16, HIDDEN, device=DEVICE)
    tokens = Unmasker(lm, decoding, head, is_fused=True)(sequences, blocks, hidden, 12)
    assert (tokens >= 0).tolist() == [[True] * 4, [True, True, True, False], [True, True, True, True], [True] * 4]


@pytest.mark.parametrize("by_blocks", [False, True])
def test_whole_answers_are_those_of_plain_operations(by_blocks, monkeypatch):
    lm = on_device(4)
    decoding = Decoding(threshold=0.3, temperature=1.0, max_new_tokens=9)
    asked = ([[5, 6, 7], [9, 8, 7, 6], [3]], 2, decoding)
    plain = NativeSampler(lm, 2, by_blocks).sample(*asked)
    monkeypatch.setattr(scheduler, "Unmasker", partial(Unmasker, is_fused=True))
    for group, others in zip(NativeSampler(lm, 2, by_blocks).sample(*asked), plain, strict=True):
        for one, other in zip(group, others, strict=True):
            assert (one.token_ids, one.reveal_step) == (other.token_ids, other.reveal_step)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def plainly(function):
    """Call it without what counts operations: the interpreter has operations of its own."""

    def call(*args):
        with _disable_current_modes():
            return function(*args)

    return call


@pytest.mark.parametrize("strategy", BUILT_IN)
@pytest.mark.parametrize("confidence", ["sampled", "entropy"])
def test_few_operations_are_left_around_the_kernels_and_none_waits_for_the_device(strategy, confidence, monkeypatch):
    lm = on_device(4)
    sequences, blocks = some_sequences(lm)
    for name in ("select_masked", "reveal_drawn"):
        monkeypatch.setattr(unmask_triton, name, plainly(getattr(unmask_triton, name)))
    monkeypatch.setattr(kernels, "draw_rows", plainly(kernels.draw_rows))

    def draw_as_on_a_gpu(logits, seeds, temperature, top_k, top_p, confidence, unsampled_ids):
        return draw_fused(logits, seeds, temperature, confidence, unsampled_ids)

    monkeypatch.setattr(sequences_module, "draw_candidates", draw_as_on_a_gpu)
    decoding = Decoding(strategy=strategy, temperature=1.0, confidence=confidence)
    unmask = Unmasker(lm, decoding, lambda hidden: hidden @ DISTINCT.to(hidden.device), is_fused=True)
    hidden = torch.zeros(16, HIDDEN, device=DEVICE)
    with Kernels() as operations:
        unmask(sequences, blocks, hidden, 12)
    assert operations.names <= Counter(index=1, mm=1, neg=1, exp=1)


COMPILE = """
from dirl_cli.rollout import unmask_triton as kernels

assert compiled(
    kernels._select_masked, ["*i64"] * 5 + ["i32"] * 5, 4, size=4, tile=kernels.TILE, masked_is=0
).asm["cubin"]
for strategy in kernels.STRATEGIES.values():
    written, read = ["*i64", "*i64", "*fp32", "*fp32", "*fp32"], ["*i64", "*i64", "*i64", *["*fp32"] * 5]
    types = [*written, *read, "*i64", *["i32"] * 6, "fp32", "fp32"]
    for size, records in ((4, True), (32, False)):
        options = dict(size=size, width=size, strategy=strategy.value, masked_is=0, record_entropy=records)
        assert compiled(kernels._reveal_drawn, types, 4, **options).asm["cubin"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_kernels_compile_for_gpus_that_are_not_here(architecture):
    compile_for(architecture, COMPILE)
