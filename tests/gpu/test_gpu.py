"""What only a CUDA device can show. `scripts/gpu_check.sh` runs these; each has a counterpart on the CPU."""

import json

import pytest
import torch

from dirl_cli.cli.app import app
from dirl_cli.diffusion.layout import pack
from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.models.attention import block_mask, dense_mask, hidden_states
from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.logprobs import LogprobModel, trajectory_logprobs
from dirl_cli.types import Decoding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[10, 11, 12, 13], [20, 21, 22, 23, 24, 25], [30], [40, 41, 42, 43, 44, 45, 46]]


def answers(lm, **options):
    decoding = Decoding(max_new_tokens=24, temperature=1.0, **options)
    return [one for group in NativeSampler(lm).sample(PROMPTS, 2, decoding) for one in group]


def packed(lm, trajectories):
    strips = [trajectory_strip(one, lm.block_size, lm.mask_token_id) for one in trajectories]
    return pack(strips, 256, lm.block_size, lm.pad_token_id)


def test_the_block_mask_is_the_dense_one():
    lm = Tiny().load("float32", "cuda")
    rows = packed(lm, answers(lm)).to(lm.device)
    length = rows.token_ids.shape[1]
    mask = block_mask(rows.coordinates)
    query, key = torch.arange(length, device="cuda")[:, None], torch.arange(length, device="cuda")[None]
    for row, dense in enumerate(dense_mask(rows.coordinates)):
        where = torch.tensor(row, device="cuda")
        assert torch.equal(mask.mask_mod(where, where * 0, query, key).expand_as(dense[0]), dense[0])


def test_flex_attention_learns_what_sdpa_learns():
    """The backward, which does not exist on a CPU: gradients of every parameter."""
    flex, sdpa = (Tiny().load("float32", "cuda", attention) for attention in ("flex", "sdpa"))
    rows = packed(sdpa, answers(sdpa)).to("cuda")
    gradients = []
    for lm in (flex, sdpa):
        logprobs, *_ = LogprobModel(lm.model, lm.unsampled_ids).to("cuda")(rows)
        logprobs.sum().backward()
        gradients.append({name: p.grad for name, p in lm.model.named_parameters() if p.grad is not None})
    for name, ours in gradients[0].items():
        error = (ours - gradients[1][name]).norm() / gradients[1][name].norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_flex_attention_in_bfloat16_stays_near_float32():
    lm = Tiny().load("float32", "cuda", "flex")
    rows = packed(lm, answers(lm)).to("cuda")
    exact = hidden_states(lm.model, rows)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = hidden_states(lm.model, rows)
    assert (rounded.float() - exact).norm() / exact.norm() < 0.02


def test_greedy_answers_are_those_of_the_cpu():
    decoding = Decoding(max_new_tokens=24)
    on_cpu, on_gpu = (
        NativeSampler(Tiny().load("float32", device)).sample(PROMPTS, 1, decoding) for device in ("cpu", "cuda")
    )
    assert [one.token_ids for [one] in on_gpu] == [one.token_ids for [one] in on_cpu]
    assert [one.reveal_step for [one] in on_gpu] == [one.reveal_step for [one] in on_cpu]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.15)])
def test_sampler_and_trainer_agree(dtype, tolerance):
    lm = Tiny().load(dtype, "cuda", "flex")
    trajectories = answers(lm, confidence="max")
    scored = trajectory_logprobs(lm, trajectories, Decoding(temperature=1.0))
    pairs = [
        pair for one, other in zip(trajectories, scored, strict=True) for pair in zip(one.logprobs, other, strict=True)
    ]
    assert max(abs(ours - theirs) for ours, theirs in pairs) < tolerance


def test_the_life_cycle_runs_in_bfloat16(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["data.train=256", "data.held_out=16", "eval_problems=8"]
    app(["sft", "steps=20", "device=cuda", *small], standalone_mode=False)
    app(["rl", "steps=2", "device=cuda", "rl.problems=4", "rl.filter=none", *small], standalone_mode=False)
    [metrics] = tmp_path.glob("runs/rl/*/metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last["mismatch_mean"] < 0.05
    app(["eval", "model=runs/rl/tiny-arithmetic-dipo/model", "limit=8", "device=cuda"], standalone_mode=False)
