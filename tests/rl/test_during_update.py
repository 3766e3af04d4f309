"""The next step's answers, sampled while the present step learns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest

from dirl_cli.cli.launch import check_values
from dirl_cli.errors import DirlError
from dirl_cli.rl.during_update import prefetch_rollout
from dirl_cli.rl.rollouts import RolloutState
from dirl_cli.rollout.storage import read_rollout
from tests.helpers.fake_rollouts import MIXED, SAME, each, ids, source
from tests.helpers.rl_runs import ARITHMETIC, SMALL, config, lines, run, save_sharp_model, updates, weights


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sharp_model(tmp_path_factory.mktemp("random") / "model")


def test_answers_are_sampled_while_the_body_runs():
    ours, began, learned = source(each(MIXED)), Event(), Event()
    answer = ours.reward_computer.compute

    def slow(answers):
        began.set()
        assert learned.wait(20), "the body did not run meanwhile"
        return answer(answers)

    ours.reward_computer.compute = slow
    with prefetch_rollout(ours, 1):
        assert began.wait(20)
        learned.set()
    assert len(ours.state.prefetched) == 2


def test_a_step_takes_what_was_prefetched_and_then_samples_on():
    prefetching, turn_by_turn = source(each(MIXED)), source(each(MIXED))
    with prefetch_rollout(prefetching, 1):
        pass
    asked = len(prefetching.sampler.asked)
    assert prefetching.collect(1) == turn_by_turn.collect(1)
    assert len(prefetching.sampler.asked) == asked, "nothing was sampled again"
    assert not prefetching.state.prefetched
    assert ids(prefetching.collect(2).groups) == ids(turn_by_turn.collect(2).groups)


def test_a_checkpoint_keeps_what_was_prefetched():
    ours = source(each(MIXED))
    with prefetch_rollout(ours, 1):
        pass
    restored = RolloutState.from_json(json.loads(json.dumps(ours.state.to_json())))
    assert restored == ours.state
    assert len(restored.prefetched) == 2


def test_a_checkpoint_of_before_it_was_called_prefetched_goes_on():
    ours = source(each(MIXED))
    with prefetch_rollout(ours, 1):
        pass
    saved = json.loads(json.dumps(ours.state.to_json()))
    earlier = {"drawn": saved["drawn"], "surplus": saved["surplus"], "ahead": saved["prefetched"]}
    assert RolloutState.from_json(earlier) == ours.state


def test_nothing_is_prefetched_where_the_surplus_will_do():
    ours = source(each(MIXED))
    ours.state = RolloutState(surplus=[[], []])
    with prefetch_rollout(ours, 1):
        pass
    assert not ours.sampler.asked
    assert not ours.state.prefetched


def test_an_update_that_fails_ends_the_sampling():
    ours = source(each(SAME), problems_per_step=6)
    answer, running, failed = ours.reward_computer.compute, Event(), Event()

    def slow(answers):
        for scored in answer(answers):
            running.set()
            assert failed.wait(20)
            yield scored

    ours.reward_computer.compute = slow
    with pytest.raises(DirlError, match="the loss"), prefetch_rollout(ours, 1):
        assert running.wait(20)
        failed.set()
        raise DirlError("the loss is nan")
    assert not ours.state.prefetched


def test_a_sampler_that_fails_ends_the_step():
    ours = source(each(MIXED))

    def broken(answers):
        raise DirlError("the reward brevity failed")

    ours.reward_computer.compute = broken
    with pytest.raises(DirlError, match="brevity"), prefetch_rollout(ours, 1):
        pass


def test_a_run_is_one_step_off_policy_and_corrects_for_it(model, tmp_path):
    cfg = config(model, "rl.async_rollout=1")
    run(cfg, tmp_path)
    assert [line["staleness"] for line in lines(tmp_path)[1:]] == [0, 1, 1, 1]
    versions = [
        {record.trajectory.weights_version for record in read_rollout(tmp_path / f"rollouts/step-00000{step}.jsonl")}
        for step in (1, 2, 3, 4)
    ]
    assert versions == [{0}, {0}, {1}, {2}]
    assert (cfg.rl.old, cfg.rl.correction_cap) == ("trainer", 2.0)


def test_without_it_a_run_stays_on_policy(model, tmp_path):
    cfg = config(model)
    run(cfg, tmp_path)
    assert (cfg.rl.old, cfg.rl.correction_cap) == ("sampler", 0.0)
    assert {line["staleness"] for line in lines(tmp_path)[1:]} == {0}


def test_a_run_that_prefetches_goes_on_to_the_same_bytes(model, tmp_path):
    cfg = config(model, "rl.async_rollout=1")
    run(cfg, tmp_path)
    whole, learned = weights(tmp_path), updates(tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "checkpoints/step-000004")
    run(cfg, tmp_path)
    assert weights(tmp_path) == whole
    assert updates(tmp_path) == learned


@pytest.mark.parametrize("critic", ["model", "head"])
def test_a_critic_learns_from_what_was_prefetched_and_goes_on_to_the_same_bytes(model, tmp_path, critic):
    words = ("rl.async_rollout=1", f"critic={critic}", "critic.lr=1e-2", "critic.gae_lambda=0.9", "eval_problems=0")
    cfg = config(model, *words)
    run(cfg, tmp_path)
    whole, learned = weights(tmp_path), updates(tmp_path)
    assert [line["staleness"] for line in lines(tmp_path)] == [0, 1, 1, 1]
    assert any(line["explained_variance"] != 0 for line in lines(tmp_path)[1:])
    kept = (tmp_path / "checkpoints/step-000004/critic.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "checkpoints/step-000004")
    run(cfg, tmp_path)
    assert (weights(tmp_path), updates(tmp_path)) == (whole, learned)
    assert (tmp_path / "checkpoints/step-000004/critic.safetensors").read_bytes() == kept


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launch", ["fsdp2", "zero2"])
def test_two_processes_that_share_the_model_prefetch_as_one_does(model, tmp_path, launch):
    words = [*SMALL, *ARITHMETIC, f"model.path={model}", "rl.async_rollout=true", "steps=3", "eval_problems=0"]
    for name, more in {"one": [], "two": ["gpus=2", f"launch={launch}"]}.items():
        command = [Path(sys.executable).with_name("dirl"), "rl", *words, *more, f"out={tmp_path / name}"]
        ended = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280)
        assert ended.returncode == 0
    assert [line["staleness"] for line in lines(tmp_path / "two")] == [0, 1, 1]
    losses, shared = ([line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two"))
    assert shared == pytest.approx(losses, rel=1e-4, abs=1e-6)


def test_it_excludes_runs_that_do_not_do_both(model, tmp_path):
    for words in (["rl.rollout_only=true"], [f"rl.replay={tmp_path}"]):
        with pytest.raises(DirlError, match="async_rollout"):
            check_values("rl", config(model, "rl.async_rollout=true", *words))
