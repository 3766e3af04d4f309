"""What only a CUDA device can show. `scripts/gpu_check.sh` runs these; each has a counterpart on the CPU."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from dirl_cli.cli import app
from dirl_cli.diffusion.layout import pack
from dirl_cli.diffusion.trace import trajectory_strip
from dirl_cli.models.attention import block_mask, dense_mask, hidden_states
from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.logprobs import TokenScorer, score_trajectories
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


def test_the_compiled_block_mask_is_the_dense_one():
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
        logprobs, _ = TokenScorer(lm.model, lm.unsampled_ids).to("cuda")(rows)
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
    scored = score_trajectories(lm, trajectories, Decoding(temperature=1.0))
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


@pytest.mark.skipif(find_spec("lmdeploy") is None, reason="needs lmdeploy")
class TestLmdeploy:
    """LMDeploy wants its published vocabulary and heads of 128."""

    @pytest.fixture(scope="class")
    def both(self, tmp_path_factory):
        from dirl_cli.models.checkpoint import Checkpoint
        from dirl_cli.rollout.lmdeploy import LmdeploySampler, start_engine

        lm = Tiny(hidden_size=256, num_attention_heads=2, intermediate_size=512).load("bfloat16", "cuda", "sdpa")
        directory = tmp_path_factory.mktemp("model") / "model"
        lm.save(directory)
        lm = Checkpoint("toy", str(directory)).load("bfloat16", "cuda", "sdpa")
        return LmdeploySampler(lm, start_engine(lm, str(directory), 8, 0.2)), NativeSampler(lm), lm

    @pytest.mark.parametrize("strategy", ["sequential", "low_confidence_static", "low_confidence_dynamic"])
    def test_greedy_traces_are_the_native_ones(self, both, strategy):
        theirs, ours, lm = both
        decoding = Decoding(strategy=strategy, max_new_tokens=24, stop_token_ids=lm.stop_token_ids)
        pairs = list(zip(theirs.sample(PROMPTS, 1, decoding), ours.sample(PROMPTS, 1, decoding), strict=True))
        equal = sum(a.token_ids == b.token_ids and a.reveal_step == b.reveal_step for [a], [b] in pairs)
        assert equal >= len(pairs) - 1, "bfloat16 may tip a tie, not two"

    def test_its_logprobs_are_the_trainers(self, both):
        theirs, _, lm = both
        decoding = Decoding(temperature=1.0, confidence="max", max_new_tokens=24)
        trajectories = [one for group in theirs.sample(PROMPTS, 2, decoding) for one in group]
        scored = score_trajectories(lm, trajectories, decoding)
        assert (
            max(
                abs(a - b)
                for one, other in zip(trajectories, scored, strict=True)
                for a, b in zip(one.logprobs, other, strict=True)
            )
            < 0.2
        )

    def test_seeds_make_answers(self, both):
        theirs, _, _ = both
        decoding = Decoding(temperature=1.0, max_new_tokens=24)
        [first], [again] = (theirs.sample(PROMPTS[:1], 1, decoding) for _ in range(2))
        [other] = theirs.sample(PROMPTS[:1], 1, replace(decoding, seed=1))
        assert first == again
        assert first[0].token_ids != other[0].token_ids

    def test_new_weights_reach_it_after_a_sleep_and_change_its_answers(self, both):
        theirs, ours, lm = both
        decoding = Decoding(max_new_tokens=24)
        before = theirs.sample(PROMPTS, 1, decoding)
        theirs.sleep()
        with torch.no_grad():
            lm.model.lm_head.weight.copy_(lm.model.lm_head.weight.roll(1, 0))
        theirs.update_weights(lm.model.named_parameters(), version=5)
        theirs.wake()
        after = theirs.sample(PROMPTS, 1, decoding)
        assert {one.weights_version for [one] in after} == {5}
        assert [one.token_ids for [one] in after] != [one.token_ids for [one] in before]
        assert (
            sum(a.token_ids == b.token_ids for [a], [b] in zip(after, ours.sample(PROMPTS, 1, decoding), strict=True))
            >= 3
        )
