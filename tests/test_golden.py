"""What the published code computes, from ../shared/golden: logits, greedy generation, losses and log-probs."""

import json

import numpy as np
import pytest
import torch

from dirl_cli import Decoding, Trajectory, load_sampler, score
from dirl_cli.diffusion.layout import Coordinates, lay_out, pack
from dirl_cli.models.attention import dense_mask
from dirl_cli.training.logprobs import LogprobModel

CHECKPOINTS = ["sdar-tiny-b4", "sdar-tiny-b8-tied"]


@pytest.fixture(params=CHECKPOINTS)
def golden(request, shared):
    path = shared / "golden" / request.param
    return path, json.loads((path / "cases.json").read_text())


def test_forward_logits(golden):
    path, cases = golden
    lm = load_sampler(path, device="cpu", dtype="float32").lm
    token_ids = torch.tensor([cases["forward"]["input_ids"]])
    position = torch.arange(token_ids.shape[1])[None]
    zeros = torch.zeros_like(position)
    mask = dense_mask(Coordinates(zeros, zeros, position // lm.block_size, zeros))
    with torch.no_grad():
        logits = lm.model(input_ids=token_ids, position_ids=position, attention_mask=mask).logits[0]
    np.testing.assert_allclose(logits.numpy(), np.load(path / "forward_logits.npy"), atol=1e-4, rtol=0)


def test_greedy_generation(golden):
    path, cases = golden
    sampler = load_sampler(path, device="cpu", dtype="float32")
    for case in cases["generate"]:
        decoding = Decoding(
            block_size=case["block_length"],
            denoising_steps=case["denoising_steps"],
            strategy=case["strategy"],
            threshold=case["threshold"],
            max_new_tokens=case["gen_length"],
        )
        [[trajectory]] = sampler.sample([case["prompt_ids"]], 1, decoding)
        answer = len(case["prompt_ids"])
        assert trajectory.token_ids == case["sequence"][answer:], case
        assert trajectory.reveal_step == case["reveal_step"][answer:], case
        assert trajectory.denoise_forwards == case["denoise_forwards"], case


def test_fine_tuning_losses(golden):
    path, cases = golden
    lm = load_sampler(path, device="cpu", dtype="float32").lm
    for case in cases["sft_loss"]:
        token_ids, masked = torch.tensor(case["input_ids"]), torch.tensor([case["masked"]], dtype=torch.bool)
        strip = lay_out(token_ids, masked, masked, masked / case["p_mask"], lm.block_size, lm.mask_token_id)
        rows = pack([strip], 128, lm.block_size, lm.pad_token_id)
        logprobs, *_ = LogprobModel(lm.model)(rows)
        loss = -(rows.weight * logprobs).sum() / (len(token_ids) - case["prompt_length"])
        assert loss.item() == pytest.approx(case["loss"], rel=1e-4)


def test_log_probs_in_the_states_that_revealed_the_tokens(golden):
    path, cases = golden
    trajectories, expected = [], []
    for case in cases["trajectory_logprob"]:
        answer = case["prompt_length"]
        trajectories.append(
            Trajectory(case["sequence"][:answer], case["sequence"][answer:], case["reveal_step"][answer:], [], "length")
        )
        expected.append(case["logprob"][answer:])
    for found, logprobs in zip(score(path, trajectories), expected, strict=True):
        assert found == pytest.approx(logprobs, abs=1e-4)
