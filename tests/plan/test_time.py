"""Plans of time: the seconds that an H100 took, a formula by hand, and what is said of it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from omegaconf import DictConfig

from dirl_cli.commands import dpo, rl, sft
from dirl_cli.commands import eval as evaluate
from dirl_cli.commands.start import recorded_answers
from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import Coordinates, attends, join_strips, pack
from dirl_cli.diffusion.states import BlockSpec, Trace
from dirl_cli.errors import DirlError, DoesNotFit
from dirl_cli.models.sdar import SDARConfig, SDARMoeConfig
from dirl_cli.models.shapes import COMMON, SDAR_1_7B, SDAR_30B
from dirl_cli.plan.architecture import Architecture, architecture
from dirl_cli.plan.devices import LMDEPLOY, NATIVE, EngineSpeed, device_here, find_device
from dirl_cli.plan.memory import Memory, parallelism
from dirl_cli.plan.time import (
    NOTHING_ASSUMED,
    Answers,
    TimePlan,
    Work,
    backpropagation_seconds,
    decoding_seconds,
    forward_operations,
    group_work,
    layer_weights,
    lmdeploy_push_seconds,
    mean_steps,
    mean_trajectory,
    optimizer_seconds,
    push_seconds,
    sampling_seconds,
    work_of,
)
from dirl_cli.types import Decoding
from tests.helpers.composed import composed
from tests.helpers.measured import ADAMW, Untrained

H100 = find_device("h100")
TOLERANCE = 1.3
STATIC, TRACE = 4, 2.4  # denoising steps of a mean block; those of the recorded trace are 12 for 5 blocks


@pytest.fixture(scope="module")
def billions() -> Architecture:
    """The published shape of 1.7B in bf16, as it was measured."""
    return architecture(SDARConfig(**COMMON | SDAR_1_7B), Untrained(), dtype=torch.bfloat16)


# What an H100 took on 2026-11-27 (torch 2.11, a model of 1.7B with random weights), and the residual, what is planned
# over what was measured, to which the tests hold the plan.

SAMPLED = [  # engine, steps a block, answers at once, tokens/s: prompts of 128 tokens and answers of 96
    (NATIVE, STATIC, 1, 160, 0.96),
    (NATIVE, STATIC, 32, 4538, 0.95),
    (NATIVE, STATIC, 128, 10_165, 0.945),
    (NATIVE, STATIC, 256, 11_385, 1.05),
    (NATIVE, TRACE, 1, 265, 0.97),
    (NATIVE, TRACE, 32, 6680, 1.03),
    (NATIVE, TRACE, 128, 14_563, 0.98),
    (LMDEPLOY, STATIC, 1, 199, 0.89),
    (LMDEPLOY, STATIC, 32, 4086, 1.07),
    (LMDEPLOY, STATIC, 128, 8090, 0.95),
    (LMDEPLOY, TRACE, 1, 270, 0.96),
    (LMDEPLOY, TRACE, 32, 5578, 1.12),
    (LMDEPLOY, TRACE, 128, 10_849, 0.99),
]


@pytest.mark.parametrize(("engine", "steps", "batch", "measured", "residual"), SAMPLED)
def test_a_sampler_takes_the_seconds_that_an_h100_took(billions, engine: EngineSpeed, steps, batch, measured, residual):
    answers = Answers(count=batch, prompts=batch, slots=batch, prompt=128, length=96, steps=steps)
    planned = batch * 96 / sampling_seconds(billions, answers, 4, engine, H100)
    assert 1 / TOLERANCE < planned / measured < TOLERANCE
    assert planned / measured == pytest.approx(residual, abs=0.015)


TRAINED = [  # compiled, checkpointed, seconds: 14,596 tokens, 3,791 of them scored
    (False, False, 0.509, 1.04),
    (True, False, 0.308, 1.04),
    (True, True, 0.404, 1.05),
]


@pytest.mark.parametrize(("compiled", "checkpointed", "measured", "residual"), TRAINED)
def test_learning_takes_the_seconds_that_an_h100_took(billions, compiled, checkpointed, measured, residual):
    """Nobody wrote down how long the demonstrations were: they are taken to be the benchmark's, of 800 tokens."""
    memory = Memory(replace(billions, trained=billions.parameters), bf16=False, dense=False, checkpointing=checkpointed)
    work = Work(14_596, 3_791, keys=14_596 * 800 / 2)
    planned = backpropagation_seconds(memory, work, 1, 1, H100, compiled)
    assert 1 / TOLERANCE < planned / measured < TOLERANCE
    assert planned / measured == pytest.approx(residual, abs=0.015)


def test_of_attention_that_is_kept_products_alone_are_computed_again(billions):
    model = replace(billions, trained=billions.parameters)
    seconds = {}
    for checkpointing in (False, True, "attention"):
        memory = Memory(model, bf16=False, dense=False, checkpointing=checkpointing)
        seconds[checkpointing] = backpropagation_seconds(memory, Work(1000, 100, keys=5e6), 1, 1, H100, True)
    attention = 4 * 28 * 2048 * 5e6 / (0.53 * H100.operations)
    assert seconds[True] == pytest.approx(4 / 3 * seconds[False])
    assert seconds["attention"] == pytest.approx(seconds[True] - attention)
    shared = replace(memory, parallelism=parallelism("fsdp2", 1))
    assert backpropagation_seconds(shared, Work(1000, 100, keys=5e6), 1, 1, H100, True) == seconds[True]


def test_a_push_takes_the_seconds_that_an_h100_took(billions):
    in_bf16 = Memory(billions, bf16=False, dense=False)  # no casts, as under a forward that is not autocast
    in_fp32 = Memory(architecture(SDARConfig(**COMMON | SDAR_1_7B), Untrained()), bf16=True, dense=False)
    assert push_seconds(in_bf16, 1, H100) / 2.8e-3 == pytest.approx(1.0, abs=0.015)
    assert push_seconds(in_fp32, 1, H100) / 5.8e-3 == pytest.approx(1.08, abs=0.015)


def test_lmdeploys_weights_take_as_long_as_they_are_large(billions):
    """What an H100 took for them at 1.7B is all that is known, and so the plan."""
    memory = Memory(billions, bf16=False, dense=False)
    assert lmdeploy_push_seconds(memory, stays_awake=True) == pytest.approx(0.219, rel=0.01)
    assert lmdeploy_push_seconds(memory, stays_awake=False) == pytest.approx(2.4 + 1.1 + 0.305, rel=0.01)


# The formulas


def test_operations_are_those_of_products_and_of_keys_that_are_seen(billions):
    """By hand: a layer of 1.7B has 2 × 2048 × (2048 + 1024) + 3 × 2048 × 6144 weights."""
    assert layer_weights(billions) == 28 * 50_331_648
    assert forward_operations(billions, Work(10, 0, 0)) == 2 * 10 * 28 * 50_331_648
    assert forward_operations(billions, Work(0, 3, 0)) == 2 * 3 * 151_936 * 2048
    assert forward_operations(billions, Work(0, 0, 1000)) == 4 * 28 * 2048 * 1000


def test_a_large_batch_computes_and_a_small_one_reads_weights(billions):
    free = EngineSpeed(0.0, 1.0, fuses_commits=False)
    small, large = (decoding_seconds(billions, batch, 4, 0, 4, free, H100) for batch in (1, 4096))
    weights = 28 * 50_331_648 + 151_936 * 2048
    assert small == pytest.approx(2 * weights / 3.0e12 + 4 * 4 * 151_936 / 3.0e12, rel=1e-3)  # norms
    logits = 4 * 4 * 4096 * 151_936 / 3.0e12
    assert large == pytest.approx(2 * weights * 4 * 4096 / 798e12 + logits)


def test_of_a_mixture_a_token_goes_through_some_experts_and_a_batch_reads_those():
    mixture = architecture(SDARMoeConfig(**COMMON | SDAR_30B), Untrained())
    assert layer_weights(mixture) == 48 * (2 * 2048 * (4096 + 512) + 3 * 2048 * 8 * 768)  # of 3 B active parameters
    free = EngineSpeed(0.0, 1.0, fuses_commits=False)
    few, many = (decoding_seconds(mixture, batch, 4, 0, 4, free, H100) for batch in (1, 64))
    assert few > 2 * 4 * layer_weights(mixture) / 3.0e12  # of four tokens each its own
    assert many == pytest.approx(2 * (mixture.layer_parameters + 151_936 * 2048) / 3.0e12, rel=0.2)  # all there are


def test_the_keys_that_a_strip_sees_are_those_of_the_attention_rule():
    spec = BlockSpec(4, 99)
    strip = Trace()(mean_trajectory(prompt=9, answer=11, steps=2.0, block_size=4), spec, generator(0))
    rows = pack([strip], len(strip), 4, 0)
    queries = Coordinates(*(part[0][:, None] for part in rows.coordinates))
    keys = Coordinates(*(part[0][None, :] for part in rows.coordinates))
    seen = attends(queries, keys)
    work = work_of(strip, 4)
    assert (work.tokens, work.scored) == (len(strip), len(strip.target_index))
    assert work.keys == int(seen.sum())


def test_a_group_shares_the_whole_blocks_of_its_prompt():
    spec = BlockSpec(4, 99)
    strip = Trace()(mean_trajectory(prompt=9, answer=11, steps=4, block_size=4), spec, generator(0))
    other = replace(strip, token_ids=strip.token_ids.clone().index_fill_(0, torch.arange(8, len(strip)), 7))
    work = group_work(strip, 9, 2, 4)
    assert work.tokens == len(join_strips([strip, other], 4)) == 2 * len(strip) - 8
    assert work.keys == 2 * work_of(strip, 4).keys - (4 * 4 + 4 * 8)


def test_blocks_take_a_step_more_or_less_so_that_the_mean_is_right():
    steps = mean_trajectory(prompt=4, answer=20, steps=2.4, block_size=4).reveal_step
    assert [max(steps[i : i + 4]) for i in range(0, 20, 4)] == [2, 2, 3, 2, 3]


def test_steps_are_the_strategys_or_assumed_or_the_most():
    static = Decoding(strategy="low_confidence_static", denoising_steps=2)
    dynamic = Decoding(denoising_steps=4)
    fast = replace(NOTHING_ASSUMED, tokens_per_forward=2.0)
    assert mean_steps(fast, static, 4, NATIVE) == 2
    assert mean_steps(NOTHING_ASSUMED, dynamic, 4, NATIVE) == 4
    assert mean_steps(fast, dynamic, 4, NATIVE) == 2
    assert mean_steps(replace(fast, tokens_per_forward=9.0), dynamic, 4, NATIVE) == 1
    assert mean_steps(fast, dynamic, 4, LMDEPLOY) == 1  # the other forward caches


def test_sharing_a_model_divides_its_optimizer_and_costs_the_link(billions):
    model = architecture(SDARConfig(**COMMON | SDAR_1_7B), ADAMW)
    alone = Memory(model, bf16=True, dense=False)
    shared = replace(alone, parallelism=parallelism("fsdp2", 8))
    assert optimizer_seconds(alone, H100) == pytest.approx(40 * model.parameters / 3.0e12)
    assert optimizer_seconds(shared, H100) == pytest.approx(optimizer_seconds(alone, H100) / 8)
    little = Work(8, 8, 8)
    travels = 3 * 4 * model.parameters * 7 / 8 / H100.link
    assert backpropagation_seconds(shared, little, 1, 8, H100, False) == pytest.approx(travels)
    slow = find_device("4090")
    assert backpropagation_seconds(shared, little, 1, 8, slow, False) > 10 * travels


# What is said


PLAN = TimePlan(
    {"rollout": 30.0, "backpropagation": 6.0}, 100, 8, H100, {"sampled": 1234.5}, True, "answers", "loading"
)


def test_a_plan_says_what_the_run_takes_and_costs_and_how_far_to_believe_it():
    assert PLAN.gpu_hours == 8
    total, rates, assumed, trust, left_out = replace(PLAN, price_per_gpu_hour=2.5).lines()
    assert total == "100 steps on 8 × h100: at most 60 minutes, 8.0 GPU-hours, 20.00 at 2.5 a GPU-hour"
    assert (rates, assumed, left_out) == ("1,234 tokens/s sampled", "taken for granted: answers", "not in it: loading")
    assert "h100 is measured" in trust and "between GPUs is by the data sheet" in trust
    assert "l40s is by its data sheet" in replace(PLAN, device=find_device("l40s")).trust()
    assert (
        replace(PLAN, is_bound=False, steps=1, gpus=1).lines()[0] == "1 step on h100: about 36 seconds, 0.01 GPU-hours"
    )


def test_a_gpu_that_nobody_knows_is_refused_and_one_that_is_here_is_known_by_its_name(monkeypatch):
    with pytest.raises(DirlError, match=r"plan.device=h10: nothing is known of such a GPU: did you mean h100\?"):
        find_device("h10")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert device_here() == H100
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")  # another device under a like name
    assert device_here() is None


def test_what_a_run_recorded_is_what_its_last_rollouts_were(tmp_path):
    assert recorded_answers(tmp_path) == NOTHING_ASSUMED
    lines = [{"step": 0, "greedy_accuracy": 0.5}]
    lines += [{"step": i, "length": 100.0 + i, "tokens_per_forward": 2.0} for i in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "le')
    recorded = recorded_answers(tmp_path)
    assert (recorded.length, recorded.tokens_per_forward) == (130, 2.0)  # of steps 21 to 40: 130.5, to the even one


ON_A_GPU = ("model=sdar8b", "dry_run=true", "plan.device=h100", "peft=lora", "gradient_checkpointing=true")


def show(command, out, *words: str) -> None:
    """Run a command's dry run of 8B on an H100. words: on top."""
    data = () if any(word.startswith("data=") for word in words) else ("data=arithmetic", "data.train=20")
    command.run(composed(command.__name__.rpartition(".")[2], *ON_A_GPU, *data, *words), out)


@pytest.mark.parametrize(
    ("command", "words", "phases"),
    [
        (sft, (), ["rows", "backpropagation", "optimizer", "evaluation"]),
        (
            dpo,
            ("data=file", "data.path=pairs.jsonl"),
            ["rows", "logprobs", "backpropagation", "optimizer", "evaluation"],
        ),
        (rl, (), ["rollout", "rows", "backpropagation", "optimizer", "push", "evaluation"]),
        (
            rl,
            ("algo.beta=0.1", "rl.epochs=2", "rl.old=trainer", "critic=head", "rollout=lmdeploy"),
            ["rollout", "rows", "logprobs", "backpropagation", "optimizer", "critic", "push", "evaluation"],
        ),
    ],
)
def test_a_dry_run_tells_the_seconds_of_each_phase(command, words, phases, nothing_here, capsys):
    show(command, nothing_here, *words)
    said = capsys.readouterr().out
    table = said[said.index("time of a step") : said.index("steps on h100")]
    assert re.findall(r"^(\w+) +[\d.,]+ +\d+ %", table, re.M) == phases
    assert re.search(r"100 steps on h100: at most .+ GPU-hours$", said, re.M)


def test_what_is_sampled_ahead_fills_the_sampler_and_is_computed_anew_at_a_push(nothing_here, capsys):
    shown = {}
    for ahead in (0, 1, 2):
        words = ("rl.problems=4", "rl.group_size=4", "plan.length=500", "plan.tokens_per_forward=2")
        show(rl, nothing_here, f"rl.async_rollout={ahead}", *words)
        said = capsys.readouterr().out
        seconds = {name: float(number) for name, number in re.findall(r"^(\w+) +([\d.]+) +\d+ %", said, re.M)}
        left_out = " ".join(said.split())
        shown[ahead] = (
            seconds,
            re.findall(r"is (\d+),?\d* for each of (\d+) at once", left_out)[0][1],
            "the end of a rollout" in left_out,
            "counted one after the other" in left_out,
        )
    assert [told[1:] for told in shown.values()] == [("16", True, False), ("16", True, True), ("32", False, True)]
    assert shown[1][0]["rollout"] == shown[0][0]["rollout"] > shown[2][0]["rollout"]
    assert shown[2][0]["push"] > shown[1][0]["push"]


def test_of_a_runs_own_servers_it_is_said_whether_one_fits(nothing_here, capsys):
    show(rl, nothing_here, "rollout=server", "rollout.servers=3")
    said = " ".join(capsys.readouterr().out.split())
    assert "3 servers on 3 GPUs after the run's own, whose hours are not in this plan; of each, this fits: the" in said
    show(rl, nothing_here, "rollout=server", "rollout.url=[http://a:1]")
    assert "what servers take, in memory and time, is theirs" in " ".join(capsys.readouterr().out.split())


def test_what_is_assumed_of_answers_makes_a_bound_a_guess_and_is_said(nothing_here, capsys):
    words = ("plan.length=500", "plan.tokens_per_forward=2", "price_per_gpu_hour=2")
    show(rl, nothing_here, "decoding.denoising_steps=4", *words)
    said = " ".join(capsys.readouterr().out.split())
    assert "taken for granted: answers of 500 tokens, 2 a forward h100 is measured" in said
    found = re.search(r"100 steps on h100: about .+?, ([\d.,]+) GPU-hours, ([\d.,]+) at 2 a GPU-hour", said)
    assert found and float(found[2]) == pytest.approx(2 * float(found[1]), abs=1.01)


def test_a_strategy_that_says_its_steps_wants_no_speed(nothing_here, capsys):
    static = ("decoding=static", "plan.length=500")
    show(rl, nothing_here, *static)
    assert "taken for granted: answers of 500 tokens, 1 a forward\n" in capsys.readouterr().out
    with pytest.raises(DirlError, match=r"plan.tokens_per_forward: .*low_confidence_static .* leave it out"):
        show(rl, nothing_here, *static, "plan.tokens_per_forward=2")


def test_where_no_gpu_is_said_a_plan_says_how_to_say_one(nothing_here, capsys):
    show(sft, nothing_here, "plan.device=null", "device=cuda", "memory_gb=80", "price_per_gpu_hour=2")
    said = capsys.readouterr().out
    assert "say which GPU it is to be for its seconds, as in plan.device=h100" in said
    assert "price_per_gpu_hour has no hours to multiply: give plan.device" in said


# Evaluations


def test_an_evaluation_is_planned_with_published_answers_or_those_it_found_itself(nothing_here, capsys):
    words = ("experiment=eval_paper", "limit=500", "plan.device=h100", "gpus=8", "rollout.max_batch=32", "dry_run=true")

    def planned(*more: str) -> str:
        evaluate.run(evaluation(*words, *more), nothing_here)
        return " ".join(capsys.readouterr().out.split())

    said = planned()
    assert "no problem of math500 is here: 500 prompts are taken to be 256 tokens" in said
    assert "parameters 16.4 GB" in said and "this fits: the sampling takes about" in said
    assert "taken for granted: answers of 2,001 tokens, 2 a forward, as published" in said
    assert "answers of 1,917 tokens, 1 a forward, as published" in planned("decoding=static")
    (nothing_here / "eval_card.json").write_text(json.dumps({"metrics": {"length": 99.6, "tokens_per_forward": 1.6}}))
    assert "answers of 100 tokens, 1.6 a forward, as " in planned()
    (nothing_here / "eval_card.json").write_text(json.dumps({"harness": {}, "results": {}}))  # of lm-eval's tasks
    assert "answers of 2,001 tokens, 2 a forward, as published" in planned()
    (nothing_here / "eval_card.json").write_text('{"metrics"')
    with pytest.raises(DirlError, match="is not the card of an evaluation: remove it, or give another out="):
        planned()
    (nothing_here / "eval_card.json").unlink()
    assert "answers of 7 tokens, 4 a forward " in planned("plan.length=7", "plan.tokens_per_forward=4")


def test_answers_of_an_evaluation_need_not_all_fit_at_once_and_a_model_has_to(nothing_here, capsys):
    words = ("model=dirl8b", "bench=math500", "limit=500", "dry_run=true", "plan.device=h100")
    evaluate.run(evaluation(*words, "rollout.max_batch=256"), nothing_here)  # of which not all may become the longest
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"keys and values of 3\d\d,\d\d\d tokens, which is 1,\d\d\d for each of 256 at once", said)
    with pytest.raises(DoesNotFit, match=r"with parameters: choose a model of at most [\d,]+ million parameters$"):
        evaluate.run(evaluation("model=sdar30b", *words[1:4], "plan.device=4090"), nothing_here)


def test_an_evaluation_that_cannot_be_planned_says_what_to_give(nothing_here):
    with pytest.raises(DirlError, match="or give limit=N to plan for so many problems"):
        evaluate.run(evaluation("experiment=eval_paper", "dry_run=true", "plan.device=h100"), nothing_here)
    with pytest.raises(DirlError, match="predictions are answers already: leave one out"):
        evaluate.run(evaluation("experiment=eval_paper", "dry_run=true", "predictions=a.jsonl"), nothing_here)
    with pytest.raises(DirlError, match="bench=likelihood samples nothing: leave it out"):
        evaluate.run(evaluation("bench=likelihood", "dry_run=true"), nothing_here)


def evaluation(*words: str) -> DictConfig:
    return composed("eval", *words)
