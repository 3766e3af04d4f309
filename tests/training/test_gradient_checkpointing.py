"""Gradient checkpointing: the same loss and gradient, and a sampler that does not notice."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dirl_cli import Decoding
from dirl_cli.cli import schema
from dirl_cli.commands import sft
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.masking import PerBlock, example
from dirl_cli.files import conf_dir
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.sft.batches import Noise
from dirl_cli.sft.validation import cross_entropy
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.parallel import start_accelerator
from dirl_cli.training.trainer import Trainer
from tests.helpers.small import MASK, PAD, small_lm


def model(checkpointing: bool) -> DiffusionLM:
    lm = small_lm()
    if checkpointing:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def rows(n: int = 2) -> Rows:
    demonstrations = [example(range(2, 22), [place >= 6 for place in range(20)], 4, PAD)] * n
    return Noise(PerBlock(), 4, MASK, PAD, row_tokens=40).rows(demonstrations, 0)[0]


def gradients(scorer: nn.Module, micro_batches: list[Rows]) -> tuple[float, list[Tensor]]:
    """The loss, and its gradient for each parameter, in training mode."""
    scorer.train()
    losses = [cross_entropy(part, *scorer(part)[:2])["loss"] for part in micro_batches]
    for loss in losses:
        loss.backward()
    return float(sum(losses).detach()), [parameter.grad for parameter in scorer.parameters()]


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradient_are_the_same_and_every_layer_is_computed_twice(autocast):
    calls = []
    lm = model(checkpointing=True)
    for layer in lm.model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, gradient = gradients(LogprobModel(lm.model), [rows()])
        expected_loss, expected = gradients(LogprobModel(model(checkpointing=False).model), [rows()])
    assert len(calls) == 2 * len(lm.model.model.layers)
    assert loss == expected_loss
    for one, other in zip(gradient, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_it_goes_with_data_parallelism_that_accumulates():
    micro_batches = rows(4).split(1)
    expected_loss, expected = gradients(LogprobModel(model(checkpointing=False).model), micro_batches)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(LogprobModel(model(checkpointing=True).model), gradient_as_bucket_view=True)
        parallel.train()
        with parallel.no_sync():
            first, _ = gradients(parallel, micro_batches[:-1])
        last, gradient = gradients(parallel, micro_batches[-1:])
    finally:
        dist.destroy_process_group()
    assert first + last == pytest.approx(expected_loss, rel=1e-6)
    for one, other in zip(gradient, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_are_not_there_twice_when_processes_share_them():
    assert start_accelerator("cpu", "float32").ddp_handler.gradient_as_bucket_view


def test_the_sampler_between_steps_keeps_its_cache(caplog):
    answers = []
    for checkpointing in (False, True):
        lm = model(checkpointing)
        optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.01)
        one = Trainer(Accelerator(cpu=True), LogprobModel(lm.model), [optimizer], lambda step: 1.0, 1.0)
        for _ in range(2):
            one.step([rows()], cross_entropy, 10)
            answers += NativeSampler(lm).sample([[5, 6, 7], [8] * 9], 2, Decoding(temperature=1.0, max_new_tokens=12))
    assert answers[:4] == answers[4:]
    assert "incompatible" not in caplog.text


def config(*words: str) -> DictConfig:
    schema.register()
    small = ["+model.hidden_size=32", "+model.num_hidden_layers=1", "+model.intermediate_size=32", "device=cpu"]
    small += ["data.train=20", "data.held_out=2", "steps=3", "batch_size=4", "eval_problems=2"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("sft", [*small, "decoding.max_new_tokens=4", *words])
    OmegaConf.resolve(cfg)
    return cfg


@pytest.mark.slow
def test_a_run_with_it_ends_the_same(tmp_path: Path):
    for kind in ("false", "true"):
        sft.run(config(f"gradient_checkpointing={kind}"), tmp_path / kind)
    lines = [[json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").open()] for kind in ("false", "true")]
    for plain, checkpointed in zip(*lines, strict=True):
        assert plain.keys() == checkpointed.keys()
        for name in {"loss", "validation_loss", "grad_norm"} & plain.keys():
            assert plain[name] == pytest.approx(checkpointed[name], rel=1e-5 if name == "grad_norm" else 1e-6)
    assert "checkpointing" not in (tmp_path / "true/model/config.json").read_text()
