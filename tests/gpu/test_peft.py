"""LoRA and QLoRA where only a CUDA device can show them; each has its counterpart in tests/models/test_peft.py."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.masking import PerBlock, example
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.peft import LoraFinetune, trainable_parameters
from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.sft.batches import Noise
from dirl_cli.sft.validation import cross_entropy
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.optim import AdamW
from dirl_cli.training.parallel import start_accelerator
from dirl_cli.training.trainer import Trainer
from dirl_cli.types import Decoding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraFinetune(ALL, rank=8, alpha=16, dropout=0.0, four_bit=False, seed=0)
KINDS = ["lora", "qlora"]


def peft(kind: str) -> LoraFinetune:
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    return replace(LORA, four_bit=kind == "qlora")


def rows(lm: DiffusionLM) -> Rows:
    demonstrations = [example(range(20, 60), [place >= 8 for place in range(40)], 4, lm.pad_token_id)] * 4
    return Noise(PerBlock(), 4, lm.mask_token_id, lm.pad_token_id, row_tokens=128).rows(demonstrations, 0)[0]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        return model(torch.arange(20, 60, device="cuda")[None]).logits.float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_learns_in_bf16_with_flex_attention(kind, checkpointing):
    lm = peft(kind).load(Tiny(), "bfloat16", "cuda", "auto")
    if checkpointing:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    frozen = {name: p.detach().clone() for name, p in lm.model.named_parameters() if not p.requires_grad}
    assert lm.model.config._attn_implementation == "flex_attention"
    optimizers = AdamW(1e-2, (0.9, 0.95), 1e-8, 0.0).build(lm.model)
    accelerator = start_accelerator("cuda", "bfloat16")
    trainer = Trainer(accelerator, LogprobModel(lm.model), optimizers, lambda step: 1.0, 1.0)
    losses = [trainer.step([rows(lm)], cross_entropy, 128)["loss"] for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(factor.dtype == torch.float32 for factor in trainable_parameters(lm.model).values())
    for name, parameter in lm.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weights_act_as_the_adapted_ones_and_are_renewed_in_place(kind):
    own = peft(kind)
    lm = own.load(Tiny(), "bfloat16", "cuda", "sdpa")
    merged = own.merged(lm)
    sampler = NativeSampler(merged)
    prompts, decoding = [[20, 21, 22], [30] * 9], Decoding(max_new_tokens=16)
    with torch.autocast("cuda", torch.bfloat16):
        before = sampler.sample(prompts, 1, decoding)
    torch.manual_seed(0)
    with torch.no_grad():
        for factor in trainable_parameters(lm.model).values():
            factor.normal_(0, 0.2)
    sampler.update_weights(own.pushed(lm), 1)
    found, expected = logits(merged.model), logits(lm.model)
    assert (found - expected).norm() / expected.norm() < 0.03  # both round to bf16, in other places
    with torch.autocast("cuda", torch.bfloat16):  # captured graphs, if any, have to see the new weights
        after = sampler.sample(prompts, 1, decoding)
        fresh = NativeSampler(own.merged(lm)).sample(prompts, 1, decoding)
    assert [one.token_ids for [one] in after] != [one.token_ids for [one] in before]
    assert [one.token_ids for [one] in after] == [one.token_ids for [one] in fresh]


def test_a_packed_model_takes_about_a_quarter_of_the_bytes():
    own = peft("qlora")
    plain = replace(own, four_bit=False)
    large = Tiny(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    planned_from = plain.load(large, "bfloat16", "cpu", "sdpa").model  # a plan sees weights that are not packed yet
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    lm = own.load(large, "bfloat16", "cuda", "sdpa")
    taken = torch.cuda.memory_allocated() - before
    assert taken == pytest.approx(own.weight_bytes(planned_from), rel=0.1)
    assert taken < 0.5 * plain.weight_bytes(planned_from)
    del lm
