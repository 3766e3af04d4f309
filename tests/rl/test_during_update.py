"""The next step's answers, sampled while the present step learns."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from dirl_cli.cli.launch import check_values
from dirl_cli.commands.rl_parts import build_rl_parts, require_ahead
from dirl_cli.errors import DirlError
from dirl_cli.rl.during_update import prefetch_rollout
from dirl_cli.rl.rollout_metrics import rollout_metrics
from dirl_cli.rl.rollout_state import RolloutState
from dirl_cli.rl.update import staleness_metrics
from dirl_cli.rollout.storage import read_rollout
from tests.helpers.fake_rollouts import MIXED, POOL, SAME, each, ids, order, source
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
    with prefetch_rollout(ours, 1, 1):
        assert began.wait(20)
        learned.set()
    assert ours.state.rounds[0].is_whole


def test_a_step_takes_what_was_prefetched_and_then_samples_on():
    prefetching, turn_by_turn = source(each(MIXED)), source(each(MIXED))
    with prefetch_rollout(prefetching, 1, 1):
        pass
    asked = len(prefetching.sampler.asked)
    assert prefetching.collect(1) == turn_by_turn.collect(1)
    assert len(prefetching.sampler.asked) == asked, "nothing was sampled again"
    assert not prefetching.state.rounds
    assert ids(prefetching.collect(2).groups) == ids(turn_by_turn.collect(2).groups)


def test_a_checkpoint_keeps_what_was_prefetched():
    ours = source(each(MIXED))
    with prefetch_rollout(ours, 1, 1):
        pass
    restored = RolloutState.from_json(json.loads(json.dumps(ours.state.to_json())))
    assert restored == ours.state
    assert len(restored.rounds[0].groups) == 2


def test_a_checkpoint_keeps_by_what_processes_share_the_work():
    ours = source(each(MIXED))
    ours.collect(0)
    restored = RolloutState.from_json(json.loads(json.dumps(ours.state.to_json())))
    assert len(restored.lengths) == 2 and restored.lengths == ours.state.lengths
    assert set(restored.lengths.values()) == {2.0}


def test_of_an_earlier_versions_checkpoint_what_was_prefetched_is_sampled_anew():
    ours = source(each(MIXED))
    with prefetch_rollout(ours, 1, 1):
        pass
    saved = json.loads(json.dumps(ours.state.to_json()))
    groups = saved.pop("rounds")[0]["answers"]
    assert RolloutState.from_json(saved | {"prefetched": groups}) == replace(ours.state, rounds=[])


def test_nothing_is_prefetched_where_the_surplus_will_do():
    ours = source(each(MIXED))
    ours.state = RolloutState(surplus=[[], []])
    with prefetch_rollout(ours, 1, 1):
        pass
    assert not ours.sampler.asked
    assert not ours.state.rounds


def test_an_update_that_fails_ends_the_sampling():
    ours = source(each(SAME), problems_per_step=6)
    answer, running, failed = ours.reward_computer.compute, Event(), Event()

    def slow(answers):
        for scored in answer(answers):
            running.set()
            assert failed.wait(20)
            yield scored

    ours.reward_computer.compute = slow
    with pytest.raises(DirlError, match="the loss"), prefetch_rollout(ours, 1, 1):
        assert running.wait(20)
        failed.set()
        raise DirlError("the loss is nan")
    assert not ours.state.rounds


def test_a_sampler_that_fails_ends_the_step():
    ours = source(each(MIXED))

    def broken(answers):
        raise DirlError("the reward brevity failed")

    ours.reward_computer.compute = broken
    with pytest.raises(DirlError, match="brevity"), prefetch_rollout(ours, 1, 1):
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


def stint(ours, step: int, most: int = 2) -> list[list[str]]:
    """The problems of the rounds under way after an update, first those of the step that follows."""
    with prefetch_rollout(ours, step, most):
        pass
    ours.state = RolloutState.from_json(json.loads(json.dumps(ours.state.to_json())))
    return [[POOL[ours.order[index]].id for index in one.indices] for one in ours.state.rounds]


def test_several_rounds_are_under_way_and_each_step_takes_the_oldest():
    ours, plain = source(each(MIXED)), source(each(MIXED))
    in_order = [ids(plain.collect(step).sampled) for step in range(3)]
    assert ids(ours.collect(0).sampled) == in_order[0]
    assert stint(ours, 1) == in_order[1:]
    first, second = ours.state.rounds
    assert first.is_whole and len(second.under_way) == 4 and not second.answers

    # Nothing is sampled by the step itself. At the next update the second goes on from where it is.
    asked = len(ours.sampler.asked)
    assert ids(ours.collect(1).groups) == in_order[1]
    assert len(ours.sampler.asked) == asked
    stint(ours, 2)
    assert ours.sampler.went_on[-1] == {(int(problem), sample) for problem in in_order[2] for sample in (0, 1)}
    assert ours.state.rounds[0].is_whole
    assert ids(ours.collect(2).groups) == in_order[2]


def test_further_draws_of_a_step_take_what_is_under_way_before_they_ask_anew():
    plain = source(each(MIXED))
    first, second, third = [ids(plain.collect(step).sampled) for step in range(3)]
    ours = source({**each(MIXED), **dict.fromkeys(second, SAME)}, max_rounds=2)
    ours.collect(0)
    stint(ours, 1)
    rollout = ours.collect(1)
    assert (ids(rollout.sampled), ids(rollout.groups)) == (second + third, third)
    assert not ours.state.rounds and ours.state.drawn == 6
    assert first != third


@pytest.mark.parametrize("goes_on", [True, False])
def test_new_weights_find_answers_under_way_which_go_on_or_begin_again(goes_on):
    ours = source(each(MIXED), partial_rollouts=goes_on)
    stint(ours, 1)
    ours.collect(1)
    stint(ours, 2)
    assert len(ours.sampler.went_on[-1]) == 4, "the weights are the same"
    ours.collect(2)
    ours.sampler.weights_version += 1
    stint(ours, 3)
    assert len(ours.sampler.went_on[-1]) == (4 if goes_on else 0)


def test_while_the_policy_is_updated_half_of_the_round_after_the_next_is_to_end():
    ours = source(each(MIXED))
    first, second = ours.draw_ahead(1, 2)
    record = ours.collect(0).groups[0][0]
    assert ours.half_of_next([first]) == 0
    assert ours.half_of_next([first, second]) == 2
    assert ours.half_of_next([first, second.take([(second.indices[0], record)], [])]) == 1
    assert ours.half_of_next([first, second.take([(i, record) for i in second.indices] * 2, [])]) == 0


def test_what_is_left_over_and_too_old_is_dropped_and_counted():
    ours = source({**each(MIXED), order()[0]: SAME}, most_stale=1)
    ours.collect(0)
    assert len(ours.state.surplus) == 1
    ours.sampler.weights_version += 2
    rollout = ours.collect(1)
    assert rollout.too_stale == 1
    assert rollout_metrics(rollout, 2)["too_stale"] == 1
    assert ids(rollout.groups) == order()[4:6]


def test_staleness_is_of_tokens_and_the_oldest_block_is_told():
    record = source(each(MIXED)).collect(0).groups[0][0]
    old = replace(record, trajectory=replace(record.trajectory, weights_version=5))
    mixed = replace(record, trajectory=replace(record.trajectory, weights_version=6, versions=[6, 8]))
    assert staleness_metrics([[old], [mixed]], 8) == {"staleness": 2.0, "staleness_max": 3.0, "spanning": 0.5}
    assert staleness_metrics([[old]], 5) == {"staleness": 0.0, "staleness_max": 0.0}


AHEAD = (
    "rl.async_rollout=2",
    "rollout.max_batch=2",
    "steps=5",
    "eval_problems=0",
    "rl.mini_batches=2",
    "rl.filter=none",
    "decoding.max_new_tokens=24",
    "keep_checkpoints=0",
)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_run_two_steps_off_policy_keeps_the_bound_and_goes_on_to_the_same_bytes(model, tmp_path, goes_on):
    cfg = config(model, *AHEAD, f"rl.partial_rollouts={goes_on}")
    run(cfg, tmp_path)
    whole, learned = weights(tmp_path), updates(tmp_path)
    rollouts = [path.read_bytes() for path in sorted(tmp_path.glob("rollouts/*"))]
    assert [line["staleness_max"] for line in lines(tmp_path)] == [0, 2, 4, 4, 4], "two steps of two optimizer steps"
    assert any("spanning" in line for line in lines(tmp_path)) is goes_on

    shutil.rmtree(tmp_path / "model")
    for step in (4, 5):
        shutil.rmtree(tmp_path / f"checkpoints/step-00000{step}")
    state = json.loads((tmp_path / "checkpoints/step-000002/state.json").read_text())
    assert any(one["under_way"] for one in state["rounds"]), "the checkpoint finds answers half done"
    run(cfg, tmp_path)
    assert (weights(tmp_path), updates(tmp_path)) == (whole, learned)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("rollouts/*"))] == rollouts


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
    words = [*SMALL, *ARITHMETIC, f"model.path={model}", "rl.async_rollout=1", "steps=3", "eval_problems=0"]
    for name, more in {"one": [], "two": ["gpus=2", f"launch={launch}"]}.items():
        command = [Path(sys.executable).with_name("dirl"), "rl", *words, *more, f"out={tmp_path / name}"]
        ended = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280)
        assert ended.returncode == 0
    assert [line["staleness"] for line in lines(tmp_path / "two")] == [0, 1, 1]
    losses, shared = ([line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two"))
    assert shared == pytest.approx(losses, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_two_steps_ahead_share_what_is_under_way_and_go_on_to_the_same_bytes(model, tmp_path):
    words = [*SMALL, *ARITHMETIC, f"model.path={model}", *AHEAD, "rl.problems=3"]
    command = [Path(sys.executable).with_name("dirl"), "rl", *words, "gpus=2", f"out={tmp_path}"]

    def run_both() -> None:
        ended = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280)
        assert ended.returncode == 0

    run_both()
    whole, learned = weights(tmp_path), updates(tmp_path)
    rollouts = [path.read_bytes() for path in sorted(tmp_path.glob("rollouts/*"))]
    assert all(line["staleness_max"] <= 4 for line in lines(tmp_path)), "two steps of two optimizer steps"
    assert any("spanning" in line for line in lines(tmp_path))

    shutil.rmtree(tmp_path / "model")
    for step in (4, 5):
        shutil.rmtree(tmp_path / f"checkpoints/step-00000{step}")
    run_both()
    assert (weights(tmp_path), updates(tmp_path)) == (whole, learned)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("rollouts/*"))] == rollouts


def test_more_than_a_step_ahead_wants_an_engine_that_can_leave_answers_and_blocks_of_one_size(model):
    for words, sentence in {
        ("rollout=lmdeploy",): "which LMDeploy cannot: give rollout=native",
        ("annealing.block_sizes=[2]", "annealing.share=0.5"): "annealing.block_sizes gives these blocks",
    }.items():
        cfg = config(model, "rl.async_rollout=2", *words)
        parts = build_rl_parts(cfg)
        with pytest.raises(DirlError, match=sentence):
            require_ahead(cfg.rl.async_rollout, parts.engine, parts.annealing)
        require_ahead(1, parts.engine, parts.annealing)


def test_it_excludes_runs_that_do_not_do_both(model, tmp_path):
    for words in (["rl.rollout_only=true"], [f"rl.replay={tmp_path}"]):
        with pytest.raises(DirlError, match="async_rollout"):
            check_values("rl", config(model, "rl.async_rollout=1", *words))
