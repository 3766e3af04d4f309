"""Loss, gradient norm and parameters after five steps, by one process and by several, on tests/helpers/steps.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dirl_cli.rollout.storage import read_rollout
from tests.helpers.rl_runs import ARITHMETIC, SMALL, save_sharp_model
from tests.helpers.steps import among, differences, take


@pytest.fixture(scope="module")
def alone():
    return {task: take(task) for task in ("sft", "rl", "dpo", "critic")}


def assert_same(alone, processes, tolerance=1e-5):
    for task, expected in alone.items():
        for found in processes:
            apart = differences(expected, found[task])
            assert max(apart.values()) < tolerance, f"{task}: {apart}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sharp_model(tmp_path_factory.mktemp("random") / "model")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("launch", ["ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_processes_take_the_same_steps_as_one(alone, tmp_path, launch):
    assert_same(alone, among(2, tmp_path, launch))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("launch", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_that_divide_every_row_take_the_same_steps_as_one(alone, tmp_path, launch):
    assert_same(alone, among(2, tmp_path, launch, context=2))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_so_do_two_with_a_critic_that_is_a_layer_a_teacher_answers_weighted_and_certainty(tmp_path):
    tasks = ("head", "distilled", "certain", "weighted")
    alone = {task: take(task) for task in tasks}
    found = among(2, tmp_path, "ddp", "+".join(tasks), context=2)
    # Weights of whole answers, by which gradients are multiplied, make more of what is rounded.
    assert_same({"weighted": alone.pop("weighted")}, found, 5e-5)
    assert_same(alone, found)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launch", ["fsdp2", "zero2"])
def test_so_do_two_that_share_the_model_and_a_teacher_that_moves_and_a_critic(tmp_path, launch):
    tasks = ("rl", "teacher", "critic")
    assert_same({task: take(task) for task in tasks}, among(2, tmp_path, launch, "+".join(tasks), context=2))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launch", ["ddp", "fsdp2"])
def test_so_do_two_with_an_adapter(tmp_path, launch):
    alone = {task: take(task, peft="lora") for task in ("sft", "rl", "dpo")}
    assert_same(alone, among(2, tmp_path, launch, "sft+rl+dpo", context=2, peft="lora"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launch", ["ddp", "fsdp2"])
def test_so_do_two_pairs_that_divide_rows_each(alone, tmp_path, launch):
    expected = {task: alone[task] for task in ("sft", "rl")}
    assert_same(expected, among(4, tmp_path, launch, "sft+rl", context=2))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("launch", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_so_do_two_that_train_an_adapter_beside_weights_that_they_share(tmp_path, launch):
    alone = {task: take(task, peft="lora") for task in ("sft", "rl")}
    assert_same(alone, among(2, tmp_path, launch, "sft+rl", peft="lora"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_so_do_two_that_share_weights_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    alone = {task: take(task, peft="qlora") for task in ("sft", "rl")}
    assert_same(alone, among(2, tmp_path, "fsdp2", "sft+rl", peft="qlora"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_so_do_four_of_which_one_has_no_row_of_a_factor_of_rank_three(tmp_path):
    alone = {"sft": take("sft", peft="lora")}
    assert_same(alone, among(4, tmp_path, "fsdp2", "sft", peft="lora"))


@pytest.mark.parametrize("rows", [1, 2])
def test_how_many_rows_a_micro_batch_has_changes_nothing(alone, rows):
    assert_same(alone, [{task: take(task, micro_rows=rows) for task in alone}])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_certainty_critic_teacher_and_corrections_are_the_same_however_rows_are_cut_and_shared_out(tmp_path):
    tasks = ("certain", "critic", "teacher", "corrected", "weighted")
    alone = {task: take(task) for task in tasks}
    assert 0 < alone["corrected"][0][0]["correction_cut"] < 0.9
    assert 0.1 < alone["corrected"][0][0]["correction_ess"] < 0.99
    assert_same(alone, [{task: take(task, micro_rows=1) for task in tasks}])
    assert_same(alone, among(2, tmp_path, "ddp", "+".join(tasks), micro_rows=1))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launch", ["ddp", "fsdp2", "zero2"])
def test_so_do_four_of_which_some_have_no_row_of_their_own(alone, tmp_path, launch):
    assert_same(alone, among(4, tmp_path, launch, micro_rows=1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_layers_that_are_computed_twice_are_gathered_twice(alone, tmp_path):
    assert_same(alone, among(2, tmp_path, "fsdp2", checkpointing=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("launch", "checkpointing"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_compiled_layers_take_the_same_steps_in_two_processes(alone, tmp_path, launch, checkpointing):
    expected = {"sft": alone["sft"], "rl": alone["rl"]}
    assert_same(expected, among(2, tmp_path, launch, "sft+rl", compiled=True, checkpointing=checkpointing))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_muon_works_on_whole_matrices_though_they_are_shared(tmp_path):
    """In bfloat16, where rounding is amplified; shards that are made orthogonal each for itself end 0.19 apart."""
    alone = {"sft": take("sft", optimizer="muon")}
    assert_same(alone, among(2, tmp_path, "fsdp2", tasks="sft", optimizer="muon"), 0.03)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("filter", ["none", "accuracy"])
def test_a_rollout_with_a_problem_for_one_of_two_processes_ends_as_it_does_for_one(model, tmp_path, filter):
    """With none a mini-batch is one row, which one process has; by accuracy no group is kept in any."""
    words = [
        *SMALL,
        *ARITHMETIC,
        f"model.path={model}",
        "rl.problems=1",
        f"rl.filter={filter}",
        "steps=2",
        "eval_problems=0",
    ]
    for name, more in {"one": [], "two": ["gpus=2"], "shared": ["gpus=2", "launch=fsdp2"]}.items():
        code = dirl_rl(tmp_path, *words, *more, f"out={tmp_path / name}")
        assert code == (filter == "accuracy")  # which leaves the model as it was
    expected = [read_rollout(file) for file in sorted(tmp_path.glob("one/rollouts/*"))]
    losses = [line.get("loss") for line in metrics(tmp_path / "one")]
    assert (None in losses) == (filter == "accuracy")
    for name in ("two", "shared"):
        found = [read_rollout(file) for file in sorted(tmp_path.glob(f"{name}/rollouts/*"))]
        assert [[one.trajectory.token_ids for one in step] for step in found] == [
            [one.trajectory.token_ids for one in step] for step in expected
        ]
        again = [line.get("loss") for line in metrics(tmp_path / name)]
        assert again == losses or again == pytest.approx(losses, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_critic_that_processes_share_learns_what_one_does_and_goes_on_to_the_same_bytes(model, tmp_path):
    words = [*SMALL, *ARITHMETIC, f"model.path={model}", "eval_problems=0", "critic=model", "critic.lr=1e-2"]
    shared = ["gpus=2", "launch=fsdp2", f"out={tmp_path}/shared"]
    assert dirl_rl(tmp_path, *words, f"out={tmp_path}/one") == dirl_rl(tmp_path, *words, *shared) == 0
    for name in ("loss", "value_loss", "explained_variance"):
        values = [line[name] for line in metrics(tmp_path / "one")]
        assert [line[name] for line in metrics(tmp_path / "shared")] == pytest.approx(values, rel=1e-3, abs=1e-5)

    def kept():
        return {file.name: file.read_bytes() for file in (tmp_path / "shared/checkpoints/step-000004").glob("critic*")}

    whole = kept()
    assert len(whole) == 4, "values and optimizer states of two processes"
    assert len(list((tmp_path / "shared/checkpoints/step-000004").glob("model-*"))) == 2, "and the policy"
    shutil.rmtree(tmp_path / "shared/model")
    shutil.rmtree(tmp_path / "shared/checkpoints/step-000004")
    assert dirl_rl(tmp_path, *words, *shared) == 0
    assert kept() == whole


def dirl_rl(here: Path, *words: str) -> int:
    """The exit code of the command."""
    command = [Path(sys.executable).with_name("dirl"), "rl", *words]
    return subprocess.run(command, cwd=here, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280).returncode


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
