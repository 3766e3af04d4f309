"""LoRA and QLoRA: what is trained, what a sampler gets, what is kept, and gradients by hand."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dirl_cli import Decoding
from dirl_cli.cli.build import build
from dirl_cli.commands import rl, sft
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.masking import PerBlock, example
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM, SavedModel
from dirl_cli.models.peft import FullFinetune, LoraFinetune, trainable_parameters
from dirl_cli.plan.architecture import architecture
from dirl_cli.plan.memory import Memory
from dirl_cli.rl.update import move_towards
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.sft.batches import Noise
from dirl_cli.sft.validation import cross_entropy
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.optim import AdamW, Muon
from dirl_cli.training.trainer import Trainer
from tests.helpers.measured import ADAMW, Size, Trial, measured
from tests.helpers.processes import run_together
from tests.helpers.rl_runs import LEARNING, composed, lines, save_sharp_model
from tests.helpers.small import MASK, PAD, random_lm, small_lm

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraFinetune(ALL, rank=4, alpha=8, dropout=0.0, four_bit=False, seed=0)
QLORA = ("four_bit", [False, pytest.param(True, id="4 bit", marks=pytest.mark.slow)])  # which bitsandbytes takes


@dataclass(frozen=True)
class Given:
    """Settings of a model that is made on the spot: untied, tied or moe."""

    kind: str = "untied"

    def load(self, dtype: str, device: str, attention: str) -> DiffusionLM:
        lm = random_lm(self.kind)
        nn.Module.to(lm.model, dtype=getattr(torch, dtype))
        return lm


def adapted(four_bit: bool = False, kind: str = "untied", dtype: str = "float32", **options: object) -> DiffusionLM:
    """A small model with an adapter as training starts it."""
    return peft(four_bit, kind, **options).load(Given(kind), dtype, "cpu", "sdpa")


def peft(four_bit: bool = False, kind: str = "untied", **options: object) -> LoraFinetune:
    if four_bit:
        pytest.importorskip("bitsandbytes")
    return replace(LORA, four_bit=four_bit, targets=ALL[:4] if kind == "moe" else ALL, **options)


def learned(lm: DiffusionLM) -> DiffusionLM:
    """The same, as training might leave it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for factor in trainable_parameters(lm.model).values():
            factor.normal_(0, 0.1)
    return lm


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(torch.arange(5, 13)[None]).logits


def rows(n: int = 2) -> Rows:
    demonstrations = [example(range(2, 22), [place >= 6 for place in range(20)], 4, PAD)] * n
    return Noise(PerBlock(), 4, MASK, PAD, row_tokens=40).rows(demonstrations, 0)[0]


def loss_of(model: nn.Module) -> Tensor:
    part = rows()
    return cross_entropy(part, *LogprobModel(model)(part)[:2])["loss"]


# What is trained


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
@pytest.mark.parametrize(*QLORA)
def test_only_the_factors_are_trained_and_a_run_begins_as_the_model_was(four_bit, kind):
    lm = adapted(four_bit, kind)
    factors = trainable_parameters(lm.model)
    assert all("lora_" in name and factor.dtype == torch.float32 for name, factor in factors.items())
    assert len(factors) == 2 * 2 * (4 if kind == "moe" else 7)  # factors × layers × targets
    before = logits(peft(four_bit, kind).reference(adapted(four_bit, kind)).model)
    assert torch.equal(logits(lm.model), before)
    assert four_bit or torch.equal(before, logits(random_lm(kind).model))


def test_the_factors_start_by_their_seed_whatever_was_drawn_before():
    one, again, other = adapted(), adapted(), adapted(seed=1)
    torch.rand(3)
    factors, same, others = (list(trainable_parameters(lm.model).values()) for lm in (one, again, other))
    assert all(torch.equal(a, b) for a, b in zip(factors, same, strict=True))
    assert not torch.equal(factors[0], others[0])


def test_the_gradients_are_those_of_the_whole_weight_through_the_factors():
    """With W + s·BA in place of W, dL/dA = s·Bᵀ·dL/dW and dL/dB = s·dL/dW·Aᵀ."""
    lm = learned(adapted())
    loss = loss_of(lm.model)
    loss.backward()
    whole = LORA.merged(lm).model.requires_grad_(True)
    whole_loss = loss_of(whole)
    whole_loss.backward()
    assert loss.item() == pytest.approx(whole_loss.item(), rel=1e-5)
    scale = LORA.alpha / LORA.rank
    for name, a in trainable_parameters(lm.model).items():
        if ".lora_A." not in name:
            continue
        b = trainable_parameters(lm.model)[name.replace(".lora_A.", ".lora_B.")]
        gradient = dict(whole.named_parameters())[name.replace(".lora_A.default", "")].grad
        torch.testing.assert_close(a.grad, scale * b.T @ gradient, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(b.grad, scale * gradient @ a.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(*QLORA)
@pytest.mark.parametrize("optim", [AdamW(1e-2, (0.9, 0.95), 1e-8, 0.1), Muon(0.02, 0.95, 1e-3, (0.9, 0.95), 1e-8, 0.1)])
def test_steps_move_the_factors_and_not_a_bit_of_the_weights(four_bit, optim):
    lm = adapted(four_bit)
    frozen = {name: p.detach().clone() for name, p in lm.model.named_parameters() if not p.requires_grad}
    start = loss_of(lm.model).item()
    optimizers = optim.build(lm.model)
    trainer = Trainer(Accelerator(cpu=True), LogprobModel(lm.model), optimizers, lambda step: 1.0, 1.0)
    own = peft(four_bit)
    sampler = NativeSampler(own.merged(lm))
    for step in range(4):
        trainer.step([rows()], cross_entropy, 10)
        sampler.update_weights(own.pushed(lm), step)
    assert loss_of(lm.model).item() < 0.97 * start
    assert all(torch.equal(dict(lm.model.named_parameters())[name], value) for name, value in frozen.items())
    assert {id(p) for one in optimizers for group in one.param_groups for p in group["params"]} == {
        id(p) for p in trainable_parameters(lm.model).values()
    }


@pytest.mark.parametrize(*QLORA)
def test_gradient_checkpointing_changes_no_gradient(four_bit):
    gradients = []
    for checkpointing in (False, True):
        lm = learned(adapted(four_bit))
        if checkpointing:
            lm.model.gradient_checkpointing_enable({"use_reentrant": False})
        lm.model.train()
        loss_of(lm.model).backward()
        gradients.append([p.grad for p in trainable_parameters(lm.model).values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def several_steps(accelerator: Accelerator) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of three steps on three micro-batches, which two processes cannot share evenly, and the factors."""
    lm = adapted()
    optimizers = AdamW(1e-2, (0.9, 0.95), 1e-8, 0.0).build(lm.model)
    trainer = Trainer(accelerator, LogprobModel(lm.model), optimizers, lambda step: 1.0, 1.0)
    losses = [trainer.step(rows(3).split(1), cross_entropy, 10)["loss"] for _ in range(3)]
    return losses, {name: factor.detach() for name, factor in trainable_parameters(lm.model).items()}


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path):
    losses, factors = several_steps(Accelerator(cpu=True))
    words = [[str(tmp_path / f"{rank}.pt")] for rank in range(2)]
    run_together(__name__, words, seconds=100, ACCELERATE_USE_CPU="true")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        for name, factor in factors.items():
            torch.testing.assert_close(found["factors"][name], factor, rtol=1e-4, atol=1e-6)


# What a sampler gets


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
@pytest.mark.parametrize(*QLORA)
def test_a_sampler_gets_weights_that_act_as_the_adapted_ones(four_bit, kind):
    lm, own = learned(adapted(four_bit, kind)), peft(four_bit, kind)
    merged = own.merged(lm)
    assert merged.model.state_dict().keys() == random_lm(kind).model.state_dict().keys()
    torch.testing.assert_close(logits(merged.model), logits(lm.model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(merged.model), logits(own.reference(lm).model), atol=1e-2)


@pytest.mark.parametrize(*QLORA)
def test_a_push_renews_them_in_place_and_shares_what_no_adapter_changes(four_bit):
    lm, own = adapted(four_bit), peft(four_bit)
    merged = own.merged(lm)
    sampler = NativeSampler(merged)
    storage = {name: p.data_ptr() for name, p in merged.model.named_parameters()}
    learned(lm)
    sampler.update_weights(own.pushed(lm), 1)
    torch.testing.assert_close(logits(merged.model), logits(lm.model), rtol=1e-4, atol=1e-5)
    assert storage == {name: p.data_ptr() for name, p in merged.model.named_parameters()}
    shared = {p.data_ptr() for p in lm.model.parameters()} & set(storage.values())
    assert len(shared) == len(storage) - 14  # two layers of seven targets have weights of their own


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
@pytest.mark.parametrize(*QLORA)
def test_a_reference_that_moves_goes_so_far_towards_the_weights_with_their_factors(four_bit, kind):
    own, lm = peft(four_bit, kind), adapted(four_bit, kind)
    reference = FullFinetune().reference(own.merged(lm)).model
    began = {name: weight.clone() for name, weight in reference.named_parameters()}
    learned(lm)
    now = dict(own.merged(lm).model.named_parameters())
    move_towards(reference, own.pushed(lm), 0.25)
    for name, weight in reference.named_parameters():
        assert torch.allclose(weight, 0.75 * began[name] + 0.25 * now[name], atol=1e-6), name
    move_towards(reference, own.pushed(lm), 1.0)
    assert torch.equal(logits(reference), logits(own.merged(lm).model))
    assert not torch.allclose(logits(reference), logits(own.reference(lm).model), atol=1e-2)


def test_the_reference_is_the_model_without_its_adapter_and_takes_no_memory():
    lm = adapted()
    reference = LORA.reference(lm).model
    learned(lm)
    assert torch.equal(logits(reference), logits(random_lm("untied").model))
    assert {p.data_ptr() for p in reference.parameters()} < {p.data_ptr() for p in lm.model.parameters()}


def test_in_bf16_the_merged_weights_are_rounded_once_and_the_factors_never():
    lm = learned(adapted(dtype="bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):  # which is not to round them either
        pushed = dict(LORA.pushed(lm))
    name, factors = "model.layers.0.mlp.up_proj", trainable_parameters(lm.model)
    product = factors[f"{name}.lora_B.default.weight"] @ factors[f"{name}.lora_A.default.weight"] * 2
    base = small_lm().model.get_submodule(name).weight.bfloat16()
    assert torch.equal(pushed[f"{name}.weight"], (base.float() + product).bfloat16())


# What a plan counts


@pytest.mark.parametrize(
    ("work", "dtype", "checkpointing", "tolerance"),
    [
        ("fine_tune", "float32", True, 0.08),
        ("fine_tune", "bfloat16", False, 0.08),
        ("reinforce", "bfloat16", False, 0.08),
        pytest.param("fine_tune", "float32", False, 0.08, marks=pytest.mark.slow),
        pytest.param("fine_tune", "bfloat16", True, 0.14, marks=pytest.mark.slow),
        pytest.param("reinforce", "float32", False, 0.08, marks=pytest.mark.slow),
        pytest.param("reinforce", "float32", True, 0.08, marks=pytest.mark.slow),
        pytest.param("reinforce", "bfloat16", True, 0.14, marks=pytest.mark.slow),
    ],
)
def test_a_run_takes_the_bytes_that_were_planned(work, checkpointing, dtype, tolerance):
    size = Size(hidden=64, layers=3, heads=4, key_heads=2, inner=192, vocabulary=1500, head_dim=32)
    found, planned = measured(Trial(size, dtype, checkpointing=checkpointing, beta=0.1, tokens=64, peft=LORA), work)
    assert planned == pytest.approx(found, rel=tolerance)


@pytest.mark.parametrize(*QLORA)
def test_the_plan_of_a_published_model_counts_factors_and_packed_weights(shared, tmp_path, four_bit):
    (tmp_path / "config.json").write_text((shared / "models/configs/SDAR-8B-Chat.json").read_text())
    own = peft(four_bit, rank=16)
    found = architecture(AutoConfig.from_pretrained(tmp_path), ADAMW, own, torch.bfloat16)
    layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))  # q, o; k, v; the MLP
    assert (found.trained, found.parameters) == (36 * layer, 8_190_735_360)
    assert found.state_bytes == pytest.approx(8 * found.trained, rel=1e-4)
    in_layers = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    rest = 2 * (found.parameters - in_layers) + 4 * found.trained
    assert found.weight_bytes + found.scale_bytes == pytest.approx(
        rest + in_layers * (0.516 if four_bit else 2), rel=1e-3
    )
    assert found.merged_bytes == 2 * in_layers
    resident = Memory(found, bf16=True, dense=False, reference=True, samples=True).resident()
    assert resident["merged weights"] == 2 * in_layers and resident["reference model"] == 0
    assert Memory(found, bf16=True, dense=False).gradients() == 4 * found.trained


# What does not fit


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"targets": ("q_proj", "up_prj")}, "peft.targets=up_prj: did you mean up_proj"),
        ({"targets": ("lm_head",)}, "peft.targets=lm_head: choose one of down_proj"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(change, sentence):
    with pytest.raises(DirlError, match=sentence):
        replace(LORA, **change).load(Given(), "float32", "cpu", "sdpa")


@pytest.mark.parametrize("package", ["peft", "bitsandbytes"])
def test_a_missing_package_is_told_before_anything_is_loaded(monkeypatch, package):
    monkeypatch.setattr("dirl_cli.models.peft.find_spec", lambda name: None if name == package else "there")
    with pytest.raises(DirlError, match=rf"needs the package {package}: pip install .*'{package}<"):
        LoraFinetune(ALL, 4, 8, 0.0, True, 0).require()


# From end to end


SFT = ("data.train=40", "data.held_out=4", "data.test=4", "steps=6", "batch_size=8", "save_every=2", "eval_problems=2")


def config(name: str, *words: str) -> DictConfig:
    small = ("device=cpu", "peft=lora", "peft.rank=4", "decoding.max_new_tokens=4")
    return composed(name, "~experiment", *small, *words)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_sharp_model(tmp_path_factory.mktemp("random") / "base")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned")
    sft.run(config("sft", *SFT, "model=path", f"model.path={base}", "optim.lr=1e-2", "peft.dropout=0.1"), out)
    return out


def test_checkpoints_hold_nothing_but_the_factors(tuned, base):
    tensors = load_file(tuned / "checkpoints/step-000006/model.safetensors")
    assert len(tensors) == 14 and all("lora_" in name and tensor.any() for name, tensor in tensors.items())
    states = load_file(tuned / "checkpoints/step-000006/optimizer.safetensors")
    assert all("lora_" in name for name in states)
    assert sum(file.stat().st_size for file in (tuned / "checkpoints/step-000006").glob("model*")) < 20_000
    assert load_file(tuned / "model/model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_adapter_and_merged_model_give_the_same_answers(tuned, base):
    merged = SavedModel("merged", str(tuned / "model")).load("float32", "cpu")
    beside = SavedModel("beside", str(base), adapter=str(tuned / "adapter")).load("float32", "cpu")
    for name, tensor in merged.model.state_dict().items():
        assert torch.equal(tensor, beside.model.state_dict()[name]), name
    prompts, decoding = [[5, 6, 7], [8] * 9], Decoding(max_new_tokens=12, temperature=1.0)
    assert NativeSampler(merged).sample(prompts, 2, decoding) == NativeSampler(beside).sample(prompts, 2, decoding)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tuned / "adapter")).eval()
    torch.testing.assert_close(logits(theirs), logits(merged.model), rtol=1e-4, atol=1e-4)


def test_the_adapter_tells_its_base_and_both_cards_the_recipe(tuned, base):
    told = json.loads((tuned / "adapter/adapter_config.json").read_text())
    assert (told["base_model_name_or_path"], told["r"], told["peft_type"]) == (str(base), 4, "LORA")
    assert told["target_modules"] == sorted(ALL), "in one order, run after run"
    for card in ("adapter/README.md", "model/README.md"):
        assert "LoraFinetune(targets=[q_proj, k_proj" in (tuned / card).read_text()


def test_a_stopped_run_goes_on_to_the_same_bytes_dropout_and_all(tuned, base, tmp_path):
    words = (*SFT, "model=path", f"model.path={base}", "optim.lr=1e-2", "peft.dropout=0.1")
    cfg = config("sft", *words, f"resume={tuned}/checkpoints/step-000004")
    sft.run(cfg, tmp_path)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tuned / file).read_bytes()


def test_a_run_does_not_go_on_beside_another_model(tuned, base, tmp_path):
    lm = SavedModel("base", str(base)).load("float32", "cpu")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[0] += 1
    lm.save(tmp_path / "other")
    words = (*SFT, "model=path", f"model.path={tmp_path}/other", f"resume={tuned}/checkpoints/step-000004")
    with pytest.raises(
        DirlError, match=r"base model.s weights differ from those that the run .* started from: restore"
    ):
        sft.run(config("sft", *words, "optim.lr=1e-2", "peft.dropout=0.1"), tmp_path)


RL = (*LEARNING, "steps=3", "save_every=2", "eval_problems=0", "data.train=40", "algo.beta=0.1")


@pytest.mark.parametrize(
    ("kind", "every"), [("lora", 0), ("lora", 1), pytest.param("qlora", 0, marks=pytest.mark.slow)]
)
def test_reinforcement_samples_with_merged_weights_and_stays_near_the_base(base, tmp_path, kind, every):
    """Or near what follows the policy every step."""
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    words = (f"peft={kind}", f"model.path={base}", "decoding.max_new_tokens=12", "gradient_checkpointing=true")
    cfg = config("rl", *RL, *words, f"algo.reference_every={every}")
    rl.run(cfg, tmp_path / "through")
    taken = [line for line in lines(tmp_path / "through") if "loss" in line]
    assert len(taken) == 3 and all(line["mismatch_max"] < 1e-4 for line in taken)
    assert taken[0]["kl"] == pytest.approx(0, abs=1e-6) and taken[-1]["kl"] > 1e-5
    cfg.resume = str(tmp_path / "through/checkpoints/step-000002")
    rl.run(cfg, tmp_path / "again")
    file = "model/model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "through" / file).read_bytes()
    assert (tmp_path / "again" / file).read_bytes() != (base / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_qlora_saves_a_merged_model_that_acts_as_the_packed_one(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    cfg = config("sft", *SFT, "peft=qlora", "model=path", f"model.path={base}", "optim.lr=1e-2")
    sft.run(cfg, tmp_path)
    lm = build(cfg.peft).load(build(cfg.model), "float32", "cpu", "sdpa")
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for name, factor in trainable_parameters(lm.model).items():
        factor.data.copy_(factors[f"base_model.model.{name.replace('.default.', '.')}"])
    saved = SavedModel("merged", str(tmp_path / "model")).load("float32", "cpu")
    torch.testing.assert_close(logits(saved.model), logits(lm.model), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":  # one of two processes
    shared = Accelerator(cpu=True)
    assert shared.num_processes == 2
    several_losses, several_factors = several_steps(shared)
    torch.save({"losses": several_losses, "factors": several_factors}, sys.argv[1])
