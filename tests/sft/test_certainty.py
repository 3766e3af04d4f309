"""Certainty in fine-tuning, beside a forward for each state and the term written out."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from dirl_cli.cli.run_dir import FREE
from dirl_cli.commands.sft import run
from dirl_cli.data.order import generator
from dirl_cli.diffusion.masking import (
    Band,
    Complementary,
    CosineRate,
    CountPerBlock,
    Example,
    Masking,
    PerBlock,
    PerSample,
    Stratified,
    example,
)
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.sft.annealing import Annealing
from dirl_cli.sft.batches import Noise
from dirl_cli.sft.certainty import certain_cross_entropy, finetuning_loss
from dirl_cli.sft.validation import cross_entropy
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.trainer import Trainer
from dirl_cli.types import Decoding
from tests.commands.test_sft import lines, weights
from tests.helpers.sft_runs import config
from tests.helpers.small import MASK, PAD, small_lm

MASKINGS = [PerBlock(), PerSample(), Band(0.3, 0.8), CosineRate(), Stratified(), Complementary(), CountPerBlock()]


def demonstrations(lm: DiffusionLM) -> list[Example]:
    """Answers that the model gives itself, so that much of what is hidden is right; the last of each is changed."""
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [3, 4]]
    answers = NativeSampler(lm).sample(prompts, 1, Decoding(max_new_tokens=11))
    examples = []
    for prompt, [answer] in zip(prompts, answers, strict=True):
        ids = [*answer.token_ids[:-1], 20]
        examples.append(example(prompt + ids, [False] * len(prompt) + [True] * len(ids), lm.block_size, PAD))
    return examples


def written_out(
    lm: DiffusionLM, examples: list[Example], masking: Masking, seed: int, certainty: float, temperature: float
) -> dict[str, Tensor]:
    """The loss and its parts, by a forward of each noised block behind what is clean."""
    random, size = generator(seed), lm.block_size
    cross_entropy = entropies = torch.zeros(())
    hidden = right = answer_tokens = 0
    for one in examples:
        answer = one.trained.nonzero().squeeze(1)
        answer_tokens += len(answer)
        for masked, weight in zip(*masking(answer // size, random), strict=True):
            state, weights = one.token_ids.clone(), torch.zeros(len(one.token_ids))
            state[answer[masked]], weights[answer] = MASK, weight
            for start in range(0, len(state), size):
                block = torch.arange(start, start + size)
                ids = torch.cat([one.token_ids[:start], state[block]])
                position = torch.arange(len(ids)) // size
                seen = (position[:, None] >= position)[None, None]
                for i, logits in zip(block, lm.model(ids[None], attention_mask=seen).logits[0, start:], strict=True):
                    if state[i] != MASK:
                        continue
                    target = one.token_ids[i]
                    hidden += 1
                    cross_entropy = cross_entropy - weights[i] * logits.log_softmax(0)[target]
                    if logits.argmax() == target:
                        right += 1
                        p = (logits / temperature).softmax(0)
                        entropies = entropies - (p * p.log()).sum()
    cross_entropy, entropies = cross_entropy / answer_tokens, entropies / hidden
    return {
        "loss": cross_entropy + certainty * entropies,
        "cross_entropy": cross_entropy,
        "certainty_loss": entropies,
        "right": torch.tensor(right / hidden),
    }


@pytest.mark.parametrize("masking", MASKINGS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_loss_its_parts_and_its_gradient_are_those_of_the_term_written_out(masking, temperature):
    lm = small_lm(scale=2.5)
    examples = demonstrations(lm)
    expected = written_out(lm, examples, masking, 7, 2.0, temperature)
    slope = torch.autograd.grad(expected["loss"], list(lm.model.parameters()))
    assert 0.2 < expected["right"] < 1 and expected["certainty_loss"] > 0.01

    rows, answer_tokens = Noise(masking, lm.block_size, MASK, PAD, 40).rows(examples, 7)
    loss = finetuning_loss(2.0, answer_tokens, len(rows.targets))
    found = loss(rows, *LogprobModel(lm.model, entropy_temperature=temperature)(rows))
    for name, value in expected.items():
        assert found[name].item() / answer_tokens == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
    steepness = torch.autograd.grad(found["loss"] / answer_tokens, list(lm.model.parameters()))
    for ours, theirs in zip(steepness, slope, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6


@pytest.mark.parametrize(("row_tokens", "micro_rows"), [(400, 1), (40, 1), (40, 2), (40, None)])
def test_neither_rows_nor_micro_batches_change_a_step(row_tokens, micro_rows):
    expected, beside = step(row_tokens=1, micro_rows=None)
    found, parameters = step(row_tokens, micro_rows)
    assert 0.2 < expected["right"] < 1
    assert found == pytest.approx(expected, rel=1e-4)
    for name, value in beside.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-4, atol=1e-5)


def step(row_tokens: int, micro_rows: int | None) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What a step of plain descent reports, and the parameters after it."""
    lm = small_lm(scale=2.5)
    rows, answer_tokens = Noise(CountPerBlock(), lm.block_size, MASK, PAD, row_tokens).rows(demonstrations(lm), 3)
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.1)
    scorer = LogprobModel(lm.model, entropy_temperature=0.5)
    trainer = Trainer(Accelerator(cpu=True), scorer, [optimizer], lambda _: 1.0, clip_norm=1.0)
    loss = finetuning_loss(2.0, answer_tokens, len(rows.targets))
    metrics = trainer.step(trainer.cut(rows, micro_rows), loss, answer_tokens)
    return metrics, {name: value.detach().clone() for name, value in lm.model.named_parameters()}


def test_without_certainty_the_loss_is_the_cross_entropy_itself():
    assert finetuning_loss(0.0, 10, 5) is cross_entropy


def test_a_causal_models_rows_hide_nothing_that_could_be_certain():
    lm = small_lm()
    examples = demonstrations(lm)
    noise = Noise(PerBlock(), lm.block_size, MASK, PAD, 40)
    [rows] = Annealing((), 0.0, 1.0, causal_weight=0.5).causal_rows(examples, noise)
    scores = LogprobModel(lm.model)(rows)
    found = certain_cross_entropy(rows, *scores, certainty=2.0, each=1.0)
    assert found["loss"] == cross_entropy(rows, *scores)["loss"]
    assert found["right"] == found["certainty_loss"] == 0


def test_a_stopped_run_with_certainty_goes_on_to_the_same_bytes_and_tells_the_term_apart(tmp_path):
    words = ("steps=40", "save_every=25", "eval_problems=0", "certainty=2")
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    run(config(*words), through)
    shutil.copytree(through, stopped)
    shutil.rmtree(stopped / "model")
    shutil.rmtree(stopped / "checkpoints/step-000040")
    run(config(*words), stopped)
    assert weights(stopped) == weights(through)

    told = lines(through)[1:]
    for line in told:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 2 * line["certainty_loss"], rel=1e-5)
    assert told[-1]["certainty_loss"] > 0 and 0 < told[-1]["right"] < 1


def test_a_run_cannot_go_on_with_another_certainty():
    assert not {"certainty", "certainty_temperature"} & FREE
