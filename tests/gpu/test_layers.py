"""Compiled layers on a GPU, FlexAttention among them: the same gradients, one code for rows of all lengths."""

import pytest
import torch
from torch._dynamo.utils import counters

from dirl_cli.models.load import DiffusionLM
from dirl_cli.training.layers import checkpoint_layers, compile_layers
from tests.helpers.small import random_lm
from tests.training.test_layers import gradients, rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def on_gpu(kind: str, attention: str) -> DiffusionLM:
    lm = random_lm(kind, head_dim=32)
    lm.model.config._attn_implementation = attention
    lm.model.to("cuda")
    return lm


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("checkpointing", [False, True, "attention"])
def test_gradients_are_those_of_layers_that_are_not_compiled(attention, checkpointing):
    torch.compiler.reset()
    counters.clear()
    expected = on_gpu("untied", "sdpa").model
    model = on_gpu("untied", attention).model
    checkpoint_layers(model, checkpointing)
    compile_layers(model)
    for length in (20, 100, 300):
        batch = rows(length).to("cuda")
        found, others = gradients(model, batch), gradients(expected, batch)
        for name, gradient in found.items():
            assert (gradient - others[name]).norm() <= 1e-4 * others[name].norm() + 1e-7, name
    assert counters["stats"]["unique_graphs"] == 1


def test_what_attention_keeps_is_more_than_nothing_and_less_than_all():
    peaks = []
    for checkpointing in (True, "attention", False):
        torch.compiler.reset()
        model = on_gpu("untied", "flex_attention").model
        checkpoint_layers(model, checkpointing)
        compile_layers(model)
        batch = rows(2000).to("cuda")
        gradients(model, batch)  # compiles
        torch.cuda.reset_peak_memory_stats()
        gradients(model, batch)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] < peaks[1] < peaks[2]


def test_a_mixture_learns_in_bf16_as_through_its_loop():
    """The gradients of experts' weights are products along rows, which CUDA wants aligned."""
    expected = on_gpu("moe", "sdpa").model
    model = on_gpu("moe", "sdpa").model
    expected.config._experts_implementation = "eager"
    model.config._experts_implementation = "dirl_grouped"
    for length in (9, 100):
        batch = rows(length).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            found, others = gradients(model, batch), gradients(expected, batch)
        for name, gradient in found.items():
            assert (gradient - others[name]).norm() <= 0.05 * others[name].norm() + 1e-5, name
