"""Plans of memory: the bytes that are measured, and remedies that work."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from transformers import AutoConfig

from dirl_cli.cli.build import build_choice
from dirl_cli.commands import dpo, rl, sft
from dirl_cli.errors import DirlError, DoesNotFit
from dirl_cli.hub import configured_repositories
from dirl_cli.models.load import SavedModel
from dirl_cli.models.sdar import SDARMoeConfig
from dirl_cli.models.shapes import PUBLISHED, outline
from dirl_cli.plan.architecture import Architecture, architecture
from dirl_cli.plan.budget import Budget, Machine, halvings
from dirl_cli.plan.duration import Duration, update_operations
from dirl_cli.plan.forecast import (
    UPDATE,
    TrainingSetup,
    alternatives,
    sharding_knobs,
    update_knobs,
    worst_case_trajectory,
)
from dirl_cli.plan.memory import Memory, MicroBatch, Parallelism, parallelism
from dirl_cli.plan.rl_forecast import rl_budget
from dirl_cli.rollout.engines import Lmdeploy, Native
from dirl_cli.training.optim import Muon
from dirl_cli.types import Decoding
from tests.helpers.composed import composed
from tests.helpers.measured import ADAMW, Size, Trial, Untrained, dipo, measured
from tests.helpers.small import small_lm

GROUPED = Size(hidden=64, layers=3, heads=4, key_heads=2, inner=192, vocabulary=1500, head_dim=32)
TIED = Size(hidden=128, layers=6, heads=4, key_heads=4, inner=256, vocabulary=300, head_dim=32, tied=True)
MUON = Muon(0.02, 0.95, 1e-3, (0.9, 0.95), 1e-8, 0.0)
LAPTOP = Machine("cpu", "float32", "auto", gpus=1, memory_gb=None)
ONE_BILLION = {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144}
BIG_GPU = Machine("cuda", "auto", "auto", gpus=1, memory_gb=80)


# What is planned is what is measured


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True, "attention"])
@pytest.mark.parametrize("micro_rows", [1, 2])
def test_fine_tuning_takes_the_bytes_that_were_planned(dtype, checkpointing, micro_rows):
    trial = Trial(GROUPED, dtype, checkpointing=checkpointing, micro_rows=micro_rows)
    found, planned = measured(trial, "fine_tune")
    assert planned == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    "trial",
    [
        Trial(GROUPED, optim=MUON),
        Trial(TIED),
        Trial(TIED, tokens=256),  # one float mask of 450 × 450 for all six layers
        Trial(TIED, tokens=400),  # 700 tokens by tiles
        Trial(replace(GROUPED, layers=1, vocabulary=20_000), tokens=400),  # two copies of a chunk of logits
    ],
)
def test_so_it_does_with_muon_a_tied_head_a_long_row_and_a_large_vocabulary(trial):
    found, planned = measured(trial, "fine_tune")
    assert planned == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_reinforcement_takes_the_bytes_that_were_planned(dtype, checkpointing, beta):
    trial = Trial(GROUPED, dtype, checkpointing=checkpointing, beta=beta, tokens=64)
    found, planned = measured(trial, "reinforce")
    assert planned == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    ("critic", "dtype"),
    [("model", "float32"), pytest.param("model", "bfloat16", marks=pytest.mark.slow), ("head", "float32")],
)
def test_a_critic_takes_the_bytes_that_were_planned(critic, dtype):
    found, planned = measured(Trial(GROUPED, dtype, critic=critic, tokens=64), "reinforce")
    assert planned == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("work", ["reinforce", "sample"])
def test_top_p_takes_the_bytes_that_were_planned(work):
    found, planned = measured(Trial(replace(GROUPED, layers=1, vocabulary=6000), top_p=0.9, tokens=64), work)
    assert planned == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize(("prompt", "tokens"), [(21, 16), (300, 8), (150, 40)])  # logits, the prompt, the cache
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_takes_the_bytes_that_were_planned(dtype, prompt, tokens):
    found, planned = measured(Trial(GROUPED, dtype, prompt=prompt, tokens=tokens), "sample")
    assert planned == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reordered_weights_take_the_bytes_that_were_planned(dtype):
    """Nearly all of a model with little else: its head is tied, and few tokens are sampled."""
    found, planned = measured(Trial(TIED, dtype, prompt=9, tokens=8, products="reordered"), "sample")
    plain, _ = measured(Trial(TIED, dtype, prompt=9, tokens=8, products="plain"), "sample")
    assert planned == pytest.approx(found, rel=0.1)
    assert found > 1.2 * plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("work", ["fine_tune", "reinforce", "sample"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_takes_the_bytes_that_were_planned(work, checkpointing):
    size = Size(hidden=1024, layers=8, heads=16, key_heads=8, inner=3072, vocabulary=32_000)
    trial = Trial(size, "bfloat16", "cuda", checkpointing=checkpointing, tokens=500, prompt=301, row_tokens=4096)
    found, planned = measured(trial, work)
    assert planned == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(("name", "parameters"), [("SDAR-4B-Chat", 4_411_424_256), ("SDAR-8B-Chat", 8_190_735_360)])
def test_published_models_have_their_parameters(shared, tmp_path, name, parameters):
    shutil.copy(shared / f"models/configs/{name}.json", tmp_path / "config.json")
    found = architecture(AutoConfig.from_pretrained(tmp_path), ADAMW)
    assert found.parameters == parameters
    assert found.state_bytes == pytest.approx(8 * parameters, rel=1e-6)
    assert found.vocabulary_parameters == 2 * 151936 * found.hidden


def test_so_do_the_smallest_and_the_mixture(shared, tmp_path):
    eight = json.loads((shared / "models/configs/SDAR-8B-Chat.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(eight | ONE_BILLION))
    assert architecture(AutoConfig.from_pretrained(tmp_path), Untrained()).parameters == 2_031_739_904
    mixture = SDARMoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
    )
    found = architecture(mixture, Untrained())
    assert found.parameters == 30_532_122_624
    assert (found.inner, found.experts) == (8 * 768, 8)


def test_muon_keeps_one_number_of_a_layers_matrices_and_two_of_the_rest():
    config = small_lm().model.config
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    both, one = architecture(config, ADAMW), architecture(config, MUON)
    assert both.state_bytes - one.state_bytes == pytest.approx(4 * matrices, rel=0.01)


def test_an_optimizer_that_looks_at_values_is_counted_too():
    class Adafactor:
        def build(self, model):
            return [torch.optim.Adafactor(model.parameters(), lr=0.1)]

    assert 0 < architecture(small_lm().model.config, Adafactor()).state_bytes < 40_000


def test_what_processes_share_is_divided_and_buckets_stay_in_every_phase():
    model = architecture(small_lm().model.config, ADAMW)
    alone = Memory(model, bf16=False, dense=True)
    sharded = replace(alone, parallelism=Parallelism(parameters=2, gradients=4, states=8))
    batch, decoding = MicroBatch(1, 64, 32, 64), Decoding()
    assert {part: alone.update(batch)[part] // sharded.update(batch)[part] for part in ("parameters", "gradients")} == {
        "parameters": 2,
        "gradients": 4,
    }
    assert alone.update(batch)["optimizer states"] // 8 == sharded.update(batch)["optimizer states"]
    together = replace(alone, parallelism=Parallelism(gradients_stay=True))
    assert alone.rollout(1, 4, 8, 4, decoding)["gradients"] == 0
    assert together.rollout(1, 4, 8, 4, decoding)["gradients"] == 4 * model.parameters


def test_each_of_four_that_divide_a_row_keeps_a_quarter_of_its_activations():
    model = architecture(small_lm().model.config, ADAMW)
    whole = Memory(model, bf16=False, dense=False, checkpointing=True)
    divided = replace(whole, context=4)
    assert 4 * divided.activations(4096 // 4, 4096) == whole.activations(4096, 4096)
    batch = MicroBatch(1, 4096, 2048, 4096)
    assert 3.5 < whole.update(batch)["activations"] / divided.update(batch)["activations"] <= 4


def test_the_second_stage_keeps_all_parameters_from_forward_to_backward():
    model = architecture(small_lm().model.config, ADAMW)
    second, third = (
        Memory(model, bf16=False, dense=True, parallelism=parallelism(launch, 4)).update(MicroBatch(1, 64, 32, 64))
        for launch in ("zero2", "fsdp2")
    )
    layers = 4 * (model.layers - 2) * model.layer_parameters // model.layers  # which the third has two of at a time
    assert second["gathered"] - third["gathered"] == layers
    assert second | {"gathered": 0} == third | {"gathered": 0}


def test_processes_share_a_critic_that_is_a_model_and_are_not_told_to_put_a_head_in_its_place():
    alone = Memory(architecture(small_lm().model.config, ADAMW), bf16=True, dense=False, critic=True)
    shared = replace(alone, parallelism=parallelism("fsdp2", 4))
    assert shared.resident()["critic"] == pytest.approx(alone.resident()["critic"] / 4, abs=4)

    asked = {"launch": "auto", "steps": 1, "micro_rows": 1, "gradient_checkpointing": True, "row_tokens": 64}
    asked |= {"rl.problems": 1, "rl.group_size": 2, "rl.mini_batches": 1, "rl.epochs": 1, "rl.async_rollout": False}
    asked |= {"rollout.max_batch": 1, "decoding.max_new_tokens": 8}
    knobs = {}
    for gpus, critic in [(1, "model"), (2, "model"), (2, "head")]:
        setup = TrainingSetup(small_lm(), ADAMW, replace(LAPTOP, gpus=gpus), asked | {"gpus": gpus})
        budget = rl_budget(setup, dipo(0.0), Decoding(temperature=1.0), 4, Native(64, "auto", 0.8), True, critic=critic)
        knobs[gpus, critic] = (budget.knobs["critic"], budget.knobs.get("launch"))
    assert knobs == {(1, "model"): (["head"], []), (2, "model"): ([], ["fsdp2"]), (2, "head"): ([], None)}


@pytest.mark.parametrize("launch", ["fsdp2", "zero2"])
def test_of_a_model_that_is_loaded_to_be_shared_a_gpu_holds_its_part_the_ends_and_one_tensor_more(launch):
    model = architecture(small_lm().model.config, ADAMW)
    memory = Memory(model, bf16=True, dense=False, cuda=True, parallelism=parallelism(launch, 2))
    ends = 4 * model.vocabulary_parameters
    assert memory.loading()["parameters"] == 4 * model.layer_parameters // 2 + ends
    assert memory.loading()["gathered"] == 4 * max(
        model.layer_parameters // model.layers, model.vocabulary * model.hidden
    )
    assert (memory.loading()["loaded model"], replace(memory, cuda=False).loading()["loaded model"]) == (
        0,
        model.weight_bytes,
    )


def test_adapters_are_shared_and_are_proposed_with_what_goes_with_them():
    asked = {"launch": "fsdp2"}
    many = TrainingSetup(small_lm(), ADAMW, replace(BIG_GPU, gpus=2), asked, adapter=partial(build_choice, "peft"))
    more_gpus = [{"gpus": 4, "launch": "fsdp2"}, {"gpus": 8, "launch": "fsdp2"}]
    assert alternatives(many, "none") == [more_gpus, [{"peft": "lora"}, {"peft": "qlora"}]]
    assert alternatives(many, "model") == [
        [{"peft": name, "critic": "head", "launch": "auto"} for name in ("lora", "qlora")]
    ]
    for name in ("lora", "qlora"):
        assert alternatives(replace(many, peft=build_choice("peft", name)), "none") == [more_gpus]
    assert [sharding_knobs({"launch": launch}, many.machine)["launch"] for launch in ("ddp", "fsdp2")] == [
        ["fsdp2"],
        [],
    ]


def test_processes_share_weights_in_4_bits_and_each_has_all_the_scales():
    model = architecture(small_lm().model.config, ADAMW, build_choice("peft", "qlora"))
    alone = Memory(model, bf16=True, dense=False)
    shared = replace(alone, parallelism=parallelism("fsdp2", 2))
    assert model.scale_bytes > 0
    assert alone.resident()["parameters"] == model.weight_bytes + model.scale_bytes
    assert shared.resident()["parameters"] == model.weight_bytes // 2 + model.scale_bytes


def test_what_an_alternative_fixes_is_not_turned_by_a_knob_and_not_said_where_it_is_so():
    def phases(asked):
        return {"update": {"all": 100 - 30 * (asked["launch"] == "fsdp2") - 20 * (asked["peft"] == "qlora")}}

    def proposals(launch, free):
        asked = {"launch": launch, "peft": "none"}
        fixed = [[{"peft": "qlora", "launch": launch}]]
        machine = replace(LAPTOP, memory_gb=free / 1e9)
        return Budget(phases, asked, {"launch": []}, machine, "", fixed).proposals()

    assert proposals("auto", 90) == [{"peft": "qlora"}]
    budget = Budget(
        phases, {"launch": "auto", "peft": "none"}, {"launch": ["fsdp2"]}, replace(LAPTOP, memory_gb=60e-9), ""
    )
    assert budget.smallest_fitting_change({"peft": "qlora", "launch": "auto"}) is None
    assert budget.smallest_fitting_change({"peft": "qlora"}) == {"peft": "qlora", "launch": "fsdp2"}


def test_a_sampler_keeps_copies_of_linear_weights_in_bf16():
    model = architecture(small_lm().model.config, ADAMW)
    on_cpu = Memory(model, bf16=True, dense=True).rollout(8, 4, 200, 4, Decoding())
    on_gpu = Memory(model, bf16=True, dense=True, cuda=True).rollout(8, 4, 200, 4, Decoding())
    assert on_gpu["KV cache"] / on_cpu["KV cache"] == (8 * 7 + 1) * 32 / (8 * 200)  # whole pages, and one to spare
    linear = [parameter for parameter in small_lm().model.parameters() if parameter.ndim == 2][1:]  # no embedding
    assert on_cpu["bf16 copies"] == on_gpu["bf16 copies"]
    assert on_gpu["bf16 copies"] == pytest.approx(2 * sum(weight.numel() for weight in linear), rel=0.02)
    assert Memory(model, bf16=False, dense=True, cuda=True).rollout(8, 4, 200, 4, Decoding())["bf16 copies"] == 0


def test_keys_and_values_take_a_share_of_what_is_left_of_a_gpu_if_so_much_can_be_needed():
    memory = Memory(architecture(small_lm().model.config, ADAMW), bf16=True, dense=False, cuda=True)
    all_slots = memory.rollout(8, 4, 200, 4, Decoding())
    held = sum(all_slots.values()) - all_slots["KV cache"] - all_slots["sampling"]
    page = 32 * memory.token_bytes
    assert memory.token_bytes == 2 * 2 * 2 * 8 * 2  # keys and values, layers, key heads, values of a head, bytes
    assert all_slots["KV cache"] == 57 * page
    for room, pages in [(57, 57), (56, 28), (20, 10), (2, 8)]:  # of eight answers of seven pages; one has to fit
        share = 1.0 if room == 57 else 0.5
        parts = memory.rollout(8, 4, 200, 4, Decoding(), free_bytes=held + room * page, cache_share=share)
        assert parts | {"KV cache": 0} == all_slots | {"KV cache": 0}
        assert parts["KV cache"] == pages * page


def test_answers_that_do_not_fit_all_at_once_are_no_reason_to_sample_fewer_on_a_gpu():
    asked = {"launch": "auto", "steps": 1, "micro_rows": 1, "gradient_checkpointing": True, "row_tokens": 64}
    asked |= {"rl.problems": 64, "rl.group_size": 2, "rl.mini_batches": 1, "rl.epochs": 1, "rl.async_rollout": False}
    asked |= {"rollout.max_batch": 128, "rollout.cache_share": 0.5, "decoding.max_new_tokens": 240}
    setup = TrainingSetup(small_lm(), ADAMW, replace(BIG_GPU, memory_gb=0.004), asked)
    engine = Native(128, "auto", 0.5)
    budget = rl_budget(setup, dipo(0.0), Decoding(temperature=1.0), 4, engine, learns=False)
    cache = budget.phases(asked)["rollout"]["KV cache"]
    assert cache < 0.6 * 128 * 256 * 128  # answers, tokens of eight pages, bytes of a token
    assert budget.fits({})
    assert f"keys and values of {cache // 128:,} tokens, which is {cache // 128 // 128:,} for each" in budget.facts
    assert budget.knobs["rollout.cache_share"] == [0.25, 0.125]
    on_cpu = replace(setup, machine=replace(LAPTOP, memory_gb=0.004))
    assert not rl_budget(on_cpu, dipo(0.0), Decoding(temperature=1.0), 4, engine, learns=False).fits({})


def test_lmdeploy_takes_its_weights_and_its_share_of_what_they_leave():
    model = architecture(small_lm().model.config, ADAMW)
    memory = Memory(model, bf16=True, dense=False, cuda=True)
    parts = memory.lmdeploy(10**6, 0.5, 64, Decoding())
    assert parts["engine's weights"] == 2 * model.parameters
    assert parts["KV cache"] == (10**6 - 6 * model.parameters) // 2
    assert parts["optimizer states"] == model.state_bytes
    with_reference = replace(memory, reference=True).lmdeploy(10**6, 0.5, 64, Decoding())
    assert parts["KV cache"] - with_reference["KV cache"] == 2 * model.parameters
    assert memory.lmdeploy(10**4, 0.5, 64, Decoding())["KV cache"] == 0


def test_an_answer_takes_as_many_steps_as_it_may():
    assert worst_case_trajectory(prompt=5, answer=7, steps=4, block_size=4).reveal_step == [2, 3, 4, 1, 2, 3, 4]
    assert worst_case_trajectory(prompt=4, answer=7, steps=2, block_size=4).reveal_step == [1, 1, 2, 2, 1, 1, 2, 2]
    assert worst_case_trajectory(prompt=4, answer=4, steps=9, block_size=4).reveal_step == [1, 2, 3, 4]


# Remedies


@st.composite
def budgets(draw) -> Budget:
    """An update of any model, of any size, on a device that may be too small for it."""
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    parameters = number(10**6, 10**10)
    model = Architecture(
        vocabulary_parameters=parameters // 10,
        layer_parameters=parameters - parameters // 10,
        trained=parameters,
        weight_bytes=4 * parameters,
        scale_bytes=0,
        merged_bytes=0,
        state_bytes=8 * parameters,
        vocabulary=number(1000, 150_000),
        layers=number(1, 40),
        hidden=number(64, 4096),
        queries=number(64, 4096),
        keys=number(64, 1024),
        inner=number(64, 12_288),
        experts=0,
    )
    memory = Memory(model, bf16=draw(st.booleans()), dense=draw(st.booleans()))

    def phases(now: Any) -> dict[str, dict[str, int]]:
        rows, width = now["micro_rows"], now["row_tokens"]
        checkpointed = replace(memory, checkpointing=now["gradient_checkpointing"])
        return {"update": checkpointed.update(MicroBatch(rows, width, rows * width // 2, 0))}

    asked = {"micro_rows": number(1, 64), "row_tokens": number(64, 32_768), "gradient_checkpointing": False}
    machine = replace(LAPTOP, memory_gb=sum(phases(asked)["update"].values()) / 1e9 * number(10, 120) / 100)
    batch = MicroBatch(asked["micro_rows"], asked["row_tokens"], 0, 0)
    return Budget(phases, asked, update_knobs(asked, batch), machine, "")


@given(budgets())
@settings(max_examples=200, deadline=None)
def test_what_is_proposed_fits_and_none_of_it_could_be_left_out_or_be_less(budget):
    changes = budget.smallest_fitting_change()
    if changes is None:
        assert not budget.fits({key: values[-1] for key, values in budget.knobs.items() if values})
        return
    assert budget.fits(changes)
    assert replace(budget, settings={**budget.settings, **changes}).verdict().startswith("this fits")
    for key, value in changes.items():
        kinder = [None, *budget.knobs[key][: budget.knobs[key].index(value)]]
        rest = {other: changes[other] for other in changes if other != key}
        assert not any(budget.fits(rest if less is None else {**rest, key: less}) for less in kinder)


@given(budgets())
@settings(max_examples=50, deadline=None)
def test_only_what_clearly_exceeds_the_memory_is_refused(budget):
    if budget.need({}) > 1.15 * budget.free_bytes:
        with pytest.raises(DirlError, match="this does not fit"):
            budget.require()
    elif budget.need({}) > 0.95 * budget.free_bytes:
        assert budget.require().startswith("this may not fit")
    else:
        assert budget.require() is None


def budget_of(needs: dict[str, int], room_gb: float, gpus: int = 1) -> Budget:
    """An update that takes so many GB by the value of micro_rows, 10 of them parameters."""
    machine = Machine("cuda", "auto", "auto", gpus, room_gb)
    phases = lambda now: {"update": {"parameters": 10**10, "rest": needs[now["micro_rows"]] * 10**9 - 10**10}}  # noqa: E731
    return Budget(phases, {"micro_rows": 4}, {"micro_rows": [2, 1]}, machine, "")


def test_a_verdict_says_by_how_much_and_what_to_give():
    needs = {4: 100, 2: 60, 1: 40}
    assert budget_of(needs, 120).verdict() == "this fits: the update takes about 100.0 GB of the GPU's 120.0 GB"
    assert budget_of(needs, 80).verdict() == (
        "this does not fit: the update takes about 100.0 GB of the GPU's 80.0 GB: give micro_rows=2, which takes"
        " 60.0 GB (memory_gb=106 starts it all the same)"
    )
    assert budget_of(needs, 100).verdict().startswith("this may not fit: the update takes about 100.0 GB")
    assert budget_of(needs, 20, gpus=8).verdict() == (
        "this does not fit: the update takes about 100.0 GB of each GPU's 20.0 GB, and 40.0 GB whatever the settings,"
        " with parameters, gradients and optimizer states: choose a model of at most 1,188 million parameters"
        " (memory_gb=106 starts it all the same)"
    )
    assert budget_of(needs, 106).require() is None


def test_halvings_end_at_the_least():
    assert halvings(64, 1) == [32, 16, 8, 4, 2, 1]
    assert halvings(100, 20) == [50, 25]
    assert halvings(1, 1) == []


def test_room_is_what_is_free_shared_among_processes_or_what_is_said():
    assert 0 < replace(LAPTOP, gpus=4).free_bytes() < LAPTOP.free_bytes()
    assert replace(LAPTOP, memory_gb=1.5).free_bytes() == 1_500_000_000
    with pytest.raises(DirlError, match=r"no CUDA device here to ask: say which it is to be, such as plan.device=h100"):
        replace(BIG_GPU, memory_gb=None).free_bytes()
    with pytest.raises(DirlError, match="device=gpu"):
        replace(BIG_GPU, device="gpu", memory_gb=None).free_bytes()


def test_longer_rollouts_want_fewer_at_once(shared, tmp_path):
    lm = small_lm()
    asked = {
        "launch": "auto",
        "steps": 1,
        "rl.epochs": 1,
        "micro_rows": 1,
        "gradient_checkpointing": True,
        "context_parallel": 1,
        "row_tokens": 64,
        "decoding.max_new_tokens": 200,
    }
    asked |= {
        "rollout.max_batch": 64,
        "rl.problems": 8,
        "rl.group_size": 8,
        "rl.mini_batches": 1,
        "rl.async_rollout": False,
    }
    machine = replace(LAPTOP, memory_gb=0.006)
    setup = TrainingSetup(lm, ADAMW, machine, asked)
    budget = rl_budget(setup, dipo(0.0), Decoding(temperature=1.0), 20, Native(64, "auto", 0.8), learns=False)
    assert list(budget.smallest_fitting_change()) == ["rollout.max_batch"]
    assert set(UPDATE) <= set(asked)


def test_where_servers_sample_and_nothing_is_learned_what_every_phase_holds_is_planned():
    asked = {"launch": "auto", "steps": 1, "micro_rows": 1, "gradient_checkpointing": True, "row_tokens": 64}
    asked |= {"rl.problems": 8, "rl.group_size": 2, "rl.mini_batches": 1, "rl.epochs": 1, "rollout.max_batch": 8}
    asked |= {"rl.async_rollout": False, "decoding.max_new_tokens": 16}
    setup = TrainingSetup(small_lm(), ADAMW, replace(LAPTOP, memory_gb=1), asked)
    budget = rl_budget(setup, dipo(0.0), Decoding(temperature=1.0), 4, engine=None, learns=False)
    [phase] = budget.phases(asked).values()
    held = phase["parameters"] + phase["optimizer states"]
    assert phase["parameters"] > 0 and sum(phase.values()) == held and budget.fits({})


def test_a_tiny_model_under_the_published_recipe_is_told_what_it_costs_and_of_the_recipe_of_its_size(monkeypatch, here):
    monkeypatch.setattr("dirl_cli.plan.duration.operations_per_second", lambda: 1e10)
    said = []
    monkeypatch.setattr("dirl_cli.report.progress.StepProgress.warn", lambda progress, text: said.append(text))
    monkeypatch.setattr("dirl_cli.rollout.engines.Native.require", stop)  # which comes next
    with pytest.raises(InterruptedError):
        rl.run(config("rl", "model=tiny", "device=cpu", "memory_gb=1000"), here / "out")
    cost, remedy = said[0].split(": lower ")
    assert cost.startswith("at most 1,048,576 tokens a step × 100 steps, in rows of 16,384: at most ")
    assert remedy.endswith("or give experiment=tiny_rl, which is for a model as small as this one")


def stop(*_: object) -> None:
    raise InterruptedError


def test_a_run_with_lmdeploy_may_be_told_to_give_it_a_smaller_share():
    lm, engine = small_lm(), Lmdeploy(max_batch=1, cache_share=0.9)
    asked = {
        "launch": "auto",
        "steps": 1,
        "rl.epochs": 1,
        "micro_rows": 1,
        "gradient_checkpointing": True,
        "row_tokens": 64,
        "decoding.max_new_tokens": 8,
    }
    asked |= {
        "rollout.max_batch": 1,
        "rl.problems": 1,
        "rl.group_size": 2,
        "rl.mini_batches": 1,
        "rl.async_rollout": False,
    }
    asked["rollout.cache_share"] = engine.cache_share
    machine = replace(BIG_GPU, memory_gb=0.001)
    setup = TrainingSetup(lm, ADAMW, machine, asked)
    budget = rl_budget(setup, dipo(0.0), Decoding(temperature=1.0), 4, engine, learns=True)
    assert budget.smallest_fitting_change() == {"rollout.cache_share": 0.45}
    assert "KV cache" not in budget.phases(asked)["update"]


def test_what_samples_while_the_model_learns_is_counted_beside_it():
    asked = {
        "launch": "auto",
        "steps": 1,
        "rl.epochs": 1,
        "micro_rows": 1,
        "gradient_checkpointing": False,
        "row_tokens": 64,
    }
    asked |= {"decoding.max_new_tokens": 8, "rollout.max_batch": 2, "rl.problems": 1, "rl.group_size": 2}
    asked |= {"rl.mini_batches": 1}

    def phases(prefetches: bool) -> dict[str, dict[str, int]]:
        settings, engine = asked | {"rl.async_rollout": prefetches}, Native(2, "auto", 0.8)
        setup = TrainingSetup(small_lm(), ADAMW, LAPTOP, settings)
        budget = rl_budget(setup, dipo(0.0), Decoding(temperature=1.0), 4, engine, learns=True)
        return budget.phases(settings)

    turns, [both] = phases(False), phases(True).values()
    rollout, update = turns["rollout"], turns["update"]
    assert both["sampler's copy"] == both["parameters"] == rollout["parameters"]
    assert both["gradients"] == update["gradients"]
    assert (both["KV cache"], both["activations"]) == (rollout["KV cache"], update["activations"])
    assert "sampler's copy" not in rollout or not rollout["sampler's copy"]


# Commands


@pytest.fixture
def one_billion(eight_billion) -> Path:
    """The published shape of 1.7B likewise, whose configuration is not among those at hand."""
    eight = json.loads((eight_billion / "config.json").read_text())
    (eight_billion / "config.json").write_text(json.dumps(eight | ONE_BILLION))
    return eight_billion


@pytest.fixture
def eight_billion(shared, tmp_path) -> Path:
    """The published configuration and tokenizer, and no weights."""
    directory = Path(shutil.copytree(shared / "models/sdar-tokenizer", tmp_path / "model"))
    shutil.copy(shared / "models/configs/SDAR-8B-Chat.json", directory / "config.json")
    return directory


def config(name: str, *words: str) -> DictConfig:
    data = [] if any(word.startswith("data=") for word in words) else ["data=arithmetic", "data.train=20"]
    return composed(name, "device=cuda", "memory_gb=80", *data, *words)


@pytest.mark.parametrize(("command", "phases"), [(sft, "update  evaluation"), (rl, "rollout    update")])
def test_a_dry_run_plans_a_model_that_has_no_weights_for_a_gpu_that_is_not_here(
    command, phases, eight_billion, tmp_path, capsys
):
    name = command.__name__.rpartition(".")[2]
    with pytest.raises(DoesNotFit):
        command.run(config(name, "model=path", f"model.path={eight_billion}", "dry_run=true"), tmp_path / "out")
    said = capsys.readouterr().out
    assert re.search(r"^batch_size: 512|^rollout: .*max_batch: 64", said, re.M)
    assert phases in said
    assert "optimizer states" in said and "65.5 GB" in said
    assert "8,190,735,360 parameters, 1,244,659,712 of them in embedding and head" in said
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_too_large_for_a_gpu_is_told_to_be_shared_among_eight(eight_billion, tmp_path, capsys):
    words = ["gpus=8", "model=path", f"model.path={eight_billion}", "dry_run=true"]
    with pytest.raises(DoesNotFit, match="give launch=fsdp2"):
        sft.run(config("sft", "experiment=dirl8b_sft", "launch=ddp", *words), tmp_path / "out")
    capsys.readouterr()
    sft.run(config("sft", "experiment=dirl8b_sft", *words), tmp_path / "out")
    said = capsys.readouterr().out
    assert "this fits: " in said
    assert re.search(r"^parameters +8.5 GB +4.1 GB +4.1 GB *$", said, re.M)  # loading, update, evaluation
    assert "the first process holds 32.8 GB while the model is loaded, 16.4 GB while it is written\n" in said


def test_the_published_reinforcement_fits_the_eight_gpus_it_asks_for(eight_billion, tmp_path, capsys):
    """Its answers of 8,192 tokens in all their states are one row of 41,000."""
    asked = {"question": "word " * 300, "ground_truth_answer": "1"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    words = ["experiment=dirl8b_rl", "data=file", f"data.path={tmp_path / 'asked.jsonl'}", "data.held_out=0"]
    rl.run(config("rl", *words, "model=path", f"model.path={eight_billion}", "dry_run=true"), tmp_path / "out")
    said = capsys.readouterr().out
    assert "this fits: the rollout takes about" in said
    assert re.search(r"^sampler's copy +17.6 GB *$", said, re.M)  # while sampling only


@pytest.mark.parametrize("engine", ["native", "lmdeploy"])
def test_the_experiment_for_one_gpu_fits_it_with_a_margin(engine, one_billion, tmp_path, capsys):
    """Also where the longest prompts are as long as they may be."""
    long = {"question": "word " * 950, "ground_truth_answer": "1"}
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(long) + "\n" for _ in range(4)))
    words = ["experiment=rl_1gpu", f"rollout={engine}", "data=file", f"data.path={tmp_path / 'long.jsonl'}"]
    cfg = config("rl", *words, "model=path", f"model.path={one_billion}", "dry_run=true")
    rl.run(cfg, tmp_path / "out")
    said = capsys.readouterr().out
    taken = re.search(r"this fits: the rollout takes about ([\d.]+) GB of the GPU's 80.0 GB", said)
    assert taken and 50 < float(taken[1]) < 72
    assert ("engine's weights   4.1 GB" in said) == (engine == "lmdeploy")


@pytest.mark.parametrize(("command", "data"), [(sft, "data=openr1math_glm"), (rl, "data=bigmath")])
def test_what_is_proposed_for_a_model_and_data_that_are_not_here_fits_when_it_is_tried(
    command, data, nothing_here, capsys
):
    """More GPUs, then adapters, before a smaller model: for 8B on one GPU of 80 GB."""
    name = command.__name__.rpartition(".")[2]
    with pytest.raises(DoesNotFit) as told:
        command.run(config(name, "model=sdar8b", data, "dry_run=true"), nothing_here)
    assert told.value.exit_code == 3
    assert "no tokenizer of sdar8b is here, so nothing is known of the data" in capsys.readouterr().out
    proposals = re.findall(r"(?:give|or) ((?:[\w.]+=\S+ ?)+), which takes", str(told.value))
    assert [re.findall(r"[\w.]+", words)[:2] for words in proposals] == [["gpus", "4"], ["peft", "lora"]]
    assert all("gradient_checkpointing=true" in words for words in proposals)
    for words in proposals:
        command.run(config(name, "model=sdar8b", data, "dry_run=true", *words.split()), nothing_here)
        assert "this fits: " in capsys.readouterr().out


def test_pairs_are_planned_with_a_copy_as_their_reference_or_with_an_adapter_without_one(nothing_here, capsys):
    words = ("model=sdar8b", "data=file", "data.path=pairs.jsonl", "dry_run=true")
    with pytest.raises(DoesNotFit, match="give peft=lora gradient_checkpointing=true, which takes"):
        dpo.run(config("dpo", *words), nothing_here)
    said = capsys.readouterr().out
    assert "answers with their prompts are taken to be as long as max_tokens=8,192" in said
    assert re.search(r"^reference model +32.8 GB +32.8 GB *$", said, re.M)
    dpo.run(config("dpo", *words, "peft=lora", "gradient_checkpointing=true"), nothing_here)
    said = capsys.readouterr().out
    assert "this fits: " in said and "reference model" not in said


def test_adapters_to_layers_that_a_model_does_not_have_are_not_proposed(nothing_here):
    with pytest.raises(DoesNotFit, match="choose a model of at most") as told:
        sft.run(config("sft", "model=sdar30b", "dry_run=true"), nothing_here)
    assert "peft" not in str(told.value)


@pytest.mark.parametrize("command", [sft, rl])
def test_what_is_not_here_is_planned_and_not_trained(command, nothing_here):
    name = command.__name__.rpartition(".")[2]
    with pytest.raises(DirlError, match="SDAR-4B-Chat is not on this machine: run `dirl download model=sdar4b` first"):
        command.run(config(name, "model=sdar4b", "device=cpu"), nothing_here)
    with pytest.raises(DirlError, match="lab/model is not on this machine"):
        command.run(config(name, "model=path", "model.path=lab/model", "dry_run=true"), nothing_here)


def test_of_a_model_of_the_hub_configuration_and_tokenizer_are_enough(eight_billion, nothing_here, capsys):
    snapshot = nothing_here / "hub/models--lab--model/snapshots/1"
    shutil.copytree(eight_billion, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("1")
    words = ["model=path", "model.path=lab/model", "dry_run=true", "peft=lora", "gradient_checkpointing=true"]
    sft.run(config("sft", *words), nothing_here)
    said = capsys.readouterr().out
    assert "20 training demonstrations of arithmetic" in said and "this fits: " in said


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("JetLM/SDAR-1.7B-Chat", 2_031_739_904),
        ("JetLM/SDAR-4B-Chat", 4_411_424_256),
        ("JetLM/SDAR-8B-Chat", 8_190_735_360),
        ("JetLM/SDAR-30B-A3B-Chat", 30_532_122_624),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(path, parameters, nothing_here):
    lm = outline(SavedModel("mine", path), "sdpa")
    assert sum(parameter.numel() for parameter in lm.model.parameters()) == parameters
    assert (lm.block_size, lm.mask_token_id, lm.tokenizer) == (4, 151669, None)


def test_every_model_of_the_hub_that_conf_names_has_a_published_shape():
    named = {path for choice, path in configured_repositories().items() if choice.startswith("model=")}
    assert named - {"models/SmolLM2-135M-Instruct"} == set(PUBLISHED)  # which is made out of a package


def duration(operations: float, **others) -> Duration:
    return replace(Duration(10, 512, 64, operations, False, "steps or batch_size", "tiny_sft"), **others)


def test_what_takes_long_on_a_cpu_says_how_long_and_what_to_give_instead(monkeypatch):
    monkeypatch.setattr("dirl_cli.plan.duration.operations_per_second", lambda: 1e10)
    said = "about 512 tokens a step × 10 steps, in rows of 64: about 2 hours on this CPU"
    remedy = ": lower steps or batch_size, or give experiment=tiny_sft, which is for a model as small as this one"
    budget = replace(budget_of({4: 1}, 120), duration=duration(3.6e13))
    assert list(replace(budget, machine=replace(LAPTOP, memory_gb=120)).warnings()) == [f"{said}{remedy}"]
    assert list(budget.warnings()) == []  # on a GPU nothing is known of it
    assert duration(3.6e13, preset=None).warning() == f"{said}: lower steps or batch_size"
    assert not duration(3e12).is_long
    assert str(duration(1e15, is_bound=True)).endswith("at most 3 days on this CPU")


def test_rows_of_a_cpu_that_are_long_for_nothing_are_counted():
    """Of the embedded model the attention over a row of 8,192 is most of the work."""
    model = architecture(small_lm().model.config, ADAMW)
    short, long = (update_operations(model, MicroBatch(1, width, width // 4, 8192)) for width in (256, 8192))
    assert long - short == 12 * 8192 * model.layers * model.queries * (8192 - 256)


@pytest.mark.parametrize("command", [sft, rl])
def test_a_run_that_cannot_fit_ends_before_weights_are_looked_for(command, eight_billion, tmp_path):
    name = command.__name__.rpartition(".")[2]
    with pytest.raises(DoesNotFit, match="this does not fit: the update takes about"):
        command.run(config(name, "model=path", f"model.path={eight_billion}", "device=cpu"), tmp_path / "out")


def test_a_run_that_is_started_all_the_same_looks_for_weights(eight_billion, tmp_path):
    cfg = config("sft", "model=path", f"model.path={eight_billion}", "device=cpu", "memory_gb=1000")
    with pytest.raises(DirlError, match=f"{eight_billion} is not a model that can be loaded"):
        sft.run(cfg, tmp_path / "out")
