"""Blocks that grow in `dirl rl`: a step samples, learns and is measured in blocks of its size, and of no other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dirl_cli.cli.run_dir import model_of_run
from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.errors import DirlError
from dirl_cli.models.load import SavedModel
from dirl_cli.rl.block_growth import NO_GROWTH, BlockGrowth
from dirl_cli.rl.during_update import prefetch_rollout
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.storage import read_rollout
from dirl_cli.types import Decoding
from tests.helpers.fake_rollouts import MIXED, each, source
from tests.helpers.rl_runs import config, lines, run, save_sharp_model, updates, weights
from tests.helpers.small import MASK, small_lm

GROWING = ("model.block_size=8", "annealing.block_sizes=[2,4]", "annealing.share=0.5", "steps=4", "save_every=1")
EVERYTHING = ("rl.async_rollout=1", "critic=model", "algo.beta=0.1", "eval_every=1", "keep_checkpoints=0")
SIZES = [2, 4, 8, 8]


def test_a_step_has_the_blocks_of_its_stage_and_those_after_the_last_the_models():
    lm = small_lm(8)
    growth = BlockGrowth.of([2, 2, 4, 4, 8], 8)
    assert growth.stages == ((2, 2), (4, 4))
    assert [growth.at(lm, step).block_size for step in range(6)] == [2, 2, 4, 4, 8, 8]
    assert growth.at(lm, 5) is lm and growth.at(lm, 0).model is lm.model
    assert str(growth) == "blocks of 2 up to step 2, of 4 up to step 4"
    assert BlockGrowth.of([8, 8], 8) == NO_GROWTH
    assert BlockGrowth.of([2, 4], 8).stages == ((1, 2), (2, 4))  # whose end the run does not reach


@pytest.mark.parametrize("by_blocks", [False, True])
def test_a_sampler_in_blocks_of_another_size_answers_as_one_that_was_made_for_them(by_blocks):
    options = Decoding(temperature=1.0, max_new_tokens=16, confidence="max")
    growing = NativeSampler(small_lm(2), by_blocks=by_blocks)
    for size in (2, 4, 8, 4):
        growing.set_block_size(size)
        made = NativeSampler(small_lm(size), by_blocks=by_blocks)
        found = growing.sample([[5, 6, 7], [8]], 2, options)
        assert found == made.sample([[5, 6, 7], [8]], 2, options)
        assert {one.block_size for group in found for one in group} == {size}


def test_answers_in_blocks_of_one_size_are_not_learned_from_in_another():
    lm = small_lm(2)
    [[one]] = NativeSampler(lm).sample([[5, 6]], 1, Decoding(max_new_tokens=8))
    with pytest.raises(DirlError, match="sampled in blocks of 2 and the model's are of 4"):
        trajectory_strip(one, 4, MASK)


def in_blocks(group, size):
    return [replace(record, trajectory=replace(record.trajectory, block_size=size)) for record in group]


def test_what_is_left_over_from_smaller_blocks_is_dropped_and_sampled_anew():
    ours = source(each(MIXED))
    small, large = ours.collect(0).groups
    ours.state = replace(ours.state, surplus=[in_blocks(small, 1), in_blocks(large, 2)])
    assert ours.surplus(0) == [in_blocks(large, 2)]
    rollout = ours.collect(1)
    assert rollout.groups[0] == in_blocks(large, 2) and len(rollout.groups) == 2

    ours.state = replace(ours.state, surplus=[in_blocks(small, 1)] * 2)
    with prefetch_rollout(ours, 2, 1):
        pass
    assert len(ours.state.rounds[0].groups) == 2, "two that cannot be used do not suffice"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sharp_model(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """With a reference that is scored in the same blocks, a critic, and the next step's answers sampled meanwhile."""
    out = tmp_path_factory.mktemp("finished")
    cfg = config(model, *GROWING, *EVERYTHING)
    run(cfg, out)
    OmegaConf.save(cfg, out / "config.yaml")  # as the command line does
    return out


def sampled_sizes(out: Path) -> list[set[int | None]]:
    return [
        {record.trajectory.block_size for record in read_rollout(out / f"rollouts/step-{step:06d}.jsonl")}
        for step in range(1, 5)
    ]


def test_each_step_samples_and_learns_in_its_own_blocks(finished):
    assert sampled_sizes(finished) == [{size} for size in SIZES]
    assert [line["block_size"] for line in lines(finished)[1:]] == SIZES
    assert all("greedy_accuracy" in line for line in lines(finished))


def test_sampler_and_trainer_agree_on_the_log_probs_in_every_stage(model, tmp_path):
    run(config(model, *GROWING), tmp_path)
    assert all(line["mismatch_max"] < 1e-4 for line in lines(tmp_path)[1:])
    assert sampled_sizes(tmp_path) == [{size} for size in SIZES]


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_run_goes_on_to_the_same_bytes_from_every_stage(finished, model, tmp_path, stopped_after):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    for step in range(stopped_after + 1, 5):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:06d}")
    run(config(model, *GROWING, *EVERYTHING), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished)
    assert updates(tmp_path / "run") == updates(finished)
    file = "rollouts/step-000004.jsonl"
    assert (tmp_path / "run" / file).read_text() == (finished / file).read_text()


def test_the_model_that_is_left_says_its_blocks_and_a_checkpoint_those_of_its_step(finished):
    assert SavedModel("ours", str(finished / "model")).load("float32", "cpu").block_size == 8
    assert json.loads((finished / "model/generation_config.json").read_text())["block_size"] == 8
    for step, size in enumerate(SIZES, start=1):
        checkpoint = {"name": "a", "path": str(finished / f"checkpoints/step-{step:06d}")}
        assert model_of_run(checkpoint)["base"]["block_size"] == size
        assert model_of_run(checkpoint | {"block_size": 16})["base"]["block_size"] == 16


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_a_checkpoint_whose_blocks_cannot_be_read_is_told(tmp_path, content):
    checkpoint = tmp_path / "checkpoints/step-000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("model: {}\npeft: {}\n")
    (checkpoint / "state.json").write_bytes(content)
    with pytest.raises(DirlError, match=r"state.json cannot be read: give another checkpoint"):
        model_of_run({"name": "a", "path": str(checkpoint)})
    (checkpoint / "state.json").write_text("[]")
    assert "block_size" not in model_of_run({"name": "a", "path": str(checkpoint)})["base"]


def test_a_run_that_ends_in_a_stage_leaves_a_model_of_its_blocks(model, tmp_path):
    run(config(model, *GROWING, "annealing.share=1.0", "steps=2"), tmp_path)
    assert [line["block_size"] for line in lines(tmp_path)[1:]] == [2, 4]
    assert SavedModel("ours", str(tmp_path / "model")).load("float32", "cpu").block_size == 4
    assert "block_size=4" in (tmp_path / "model/README.md").read_text()


def test_a_replay_grows_alike_and_refuses_what_is_in_other_blocks(model, finished, tmp_path):
    run(config(model, *GROWING, f"rl.replay={finished}"), tmp_path / "replay")
    assert [line["block_size"] for line in lines(tmp_path / "replay")[1:]] == SIZES
    with pytest.raises(DirlError, match="was sampled in blocks of 2 and the model's are of 8"):
        run(config(model, "model.block_size=8", f"rl.replay={finished}"), tmp_path / "other")


def test_the_plan_says_which_blocks_come_when(model, tmp_path, capsys):
    run(config(model, *GROWING, "dry_run=true"), tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "blocks of 2 up to step 1, of 4 up to step 2, of 8 thereafter; memory and time are those of the largest"
        in shown
    )


MEASURED = ("model.block_size=8", "annealing.block_sizes=[2,4]", "annealing.patience=1", "eval_every=1", "save_every=1")


def test_blocks_grow_as_held_out_accuracy_stops_rising_and_a_run_goes_on_to_the_same_bytes(model, tmp_path, capsys):
    """A random model answers nothing right: the second evaluation of each stage is no better than its first."""
    cfg = config(model, *MEASURED, "steps=5", "keep_checkpoints=0")
    run(cfg, tmp_path)
    assert "blocks of 2, of 4, each until greedy_accuracy has not improved for 1" in capsys.readouterr().out
    assert [line["block_size"] for line in lines(tmp_path)[1:]] == [2, 2, 4, 4, 8]
    whole, told = weights(tmp_path), updates(tmp_path)
    for step, size in enumerate([2, 2, 4, 4, 8], start=1):
        checkpoint = {"name": "a", "path": str(tmp_path / f"checkpoints/step-{step:06d}")}
        OmegaConf.save(cfg, tmp_path / "config.yaml")
        assert model_of_run(checkpoint)["base"]["block_size"] == size

    shutil.rmtree(tmp_path / "model")
    for step in (2, 3, 4, 5):
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:06d}")
    run(cfg, tmp_path)
    assert weights(tmp_path) == whole and updates(tmp_path) == told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*MEASURED, "eval_every=0"], r"annealing\.patience counts evaluations: give eval_every=N"),
        ([*MEASURED, "rl.async_rollout=1"], r"leave out rl\.async_rollout, rl\.replay and"),
        ([*MEASURED, "eval_problems=0"], r"ends a stage by what is held out, and nothing is"),
        (["annealing.patience=1", "eval_every=1"], r"annealing\.patience is of annealing\.block_sizes"),
        (["annealing.most_steps=1"], r"bound what annealing\.patience ends"),
        ([*MEASURED, "annealing.least_steps=3", "annealing.most_steps=2"], r"most_steps=2 is less than"),
        (["annealing.block_sizes=[3]", "annealing.share=0.5"], r"each must divide the next, up to 4"),
        (["annealing=blocks"], r"are of dirl sft"),
        (["annealing.block_sizes=[2]", "annealing.share=0.5", "rollout=lmdeploy"], r"wants rollout=native"),
    ],
)
def test_growth_that_cannot_be_is_told(model, tmp_path, words, sentence):
    with pytest.raises(DirlError, match=sentence):
        run(config(model, *words), tmp_path)
