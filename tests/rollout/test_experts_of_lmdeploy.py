"""LMDeploy's mixture of experts with pushed weights, its kernels among it: what ours computes. Interpreted on a CPU."""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is first imported
pytest.importorskip("lmdeploy")
pytest.importorskip("triton")

from lmdeploy.pytorch.kernels.cuda import activation
from lmdeploy.pytorch.kernels.cuda.moe import fused_moe
from lmdeploy.pytorch.weight_loader.model_weight_loader import process_weights_after_loading
from triton import language as tl
from triton.runtime.interpreter import InterpretedFunction

from dirl_cli.models.save import published_weights
from tests.helpers.small import random_lm
from tests.rollout.test_lmdeploy import their_model

pytestmark = pytest.mark.skipif(
    not isinstance(fused_moe._moe_reduce_kernel, InterpretedFunction), reason="Triton was imported to compile"
)


class Untuned:
    """A kernel in one of its configurations, which it would be measured for on a GPU. tile: rows, columns, depth."""

    def __init__(self, kernel: Any, tile: tuple[int, int, int]) -> None:
        self.kernel = kernel
        self.meta = dict(zip(("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K"), tile, strict=True), GROUP_SIZE_M=1)

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.kernel[grid(self.meta)](*args, **kwargs, **self.meta)


@pytest.fixture(params=[False, True], ids=["any-gpu", "hopper"])
def kernels(request, monkeypatch):
    """Its kernels as they are launched on a GPU: routing in one block of threads, as on Hopper, or in several."""
    monkeypatch.setattr(fused_moe, "_supports_single_cta_route_prepare", lambda topk_ids: request.param)
    monkeypatch.setattr(fused_moe, "fused_moe_kernel", Untuned(fused_moe.fused_moe_kernel.fn, (64, 256, 32)))
    monkeypatch.setattr(activation, "fast_expf", lambda x: tl.exp(x))  # the interpreter knows it under this name alone
    monkeypatch.setattr(activation, "get_device_props", lambda device: {"multi_processor_count": 4, "warps_per_sm": 16})


@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize("tokens", [1, 9])
def test_its_experts_with_pushed_weights_are_ours(kernels, renormalises, tokens):
    lm = random_lm("moe")
    lm.model.config.norm_topk_prob = renormalises
    theirs = their_model(lm)
    for scale in (2.0, 3.0):  # the second time onto what it made of the first
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter.mul_(scale)
        with torch.inference_mode():  # as an engine's own
            theirs.load_weights(published_weights(lm.model, lm.model.named_parameters()))
            process_weights_after_loading(theirs)
        for ours, other in zip(lm.model.model.layers, theirs.model.layers, strict=True):
            ours.mlp.gate.norm_topk_prob = renormalises
            hidden = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(tokens))
            with torch.inference_mode():
                torch.testing.assert_close(other.mlp(hidden.clone()), ours.mlp(hidden), rtol=1e-5, atol=1e-5)
