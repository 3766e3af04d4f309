"""How far a run is, by what it left; and whatever else lies there, nothing is worse than a line that says so."""

import fcntl
import json

import pytest

from dirl_cli.overview.find import find_runs
from dirl_cli.overview.status import seconds_left, status_of
from tests.helpers.run_directories import RL, make_evaluation, make_run


def state(run):
    return status_of(run).state


def test_a_run_that_left_its_model_is_finished(tmp_path):
    status = status_of(make_run(tmp_path / "a"))
    assert (status.state, status.step, status.steps, status.command) == ("finished", 4, 4, "rl")
    assert status.metrics["reward"] == 0.5 and status.metrics["greedy_accuracy"] == 0.25


def test_one_that_saved_its_last_step_is_stopped_and_one_with_later_steps_was_cut_short(tmp_path):
    assert state(make_run(tmp_path / "stopped", steps=3, saved=3, finished=False)) == "stopped"
    killed = status_of(make_run(tmp_path / "killed", steps=3, saved=2, finished=False))
    assert killed.state == "failed" and "after step 3" in killed.remark and "step 2" in killed.remark
    assert state(make_run(tmp_path / "begun", steps=0, saved=0, finished=False)) == "stopped"


def test_a_checkpoint_that_is_not_whole_does_not_count(tmp_path):
    run = make_run(tmp_path / "a", steps=3, saved=3, finished=False)
    (run / "checkpoints/step-000003/SHA256SUMS").unlink()
    assert state(run) == "failed"


def test_one_whose_lock_is_held_is_running_whatever_else_it_left(tmp_path):
    run = make_run(tmp_path / "a", steps=3)
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = status_of(run)
    assert status.state == "running" and status.seconds_left == 0.0  # by the clock it should have long been done
    assert state(run) == "finished"


def test_the_sentence_of_a_process_that_failed_is_the_remark(tmp_path):
    run = make_run(tmp_path / "a", finished=False, steps=2, saved=2)
    (run / "failure.txt").write_text(json.dumps(["process 1 was killed by SIGKILL", 1]))
    assert status_of(run).state == "failed" and status_of(run).remark == "process 1 was killed by SIGKILL"
    (run / "failure.txt").write_text(json.dumps(['seed="a": give a number…\nfor example 1', 1]))
    assert status_of(run).remark == 'seed="a": give a number…\nfor example 1'
    (run / "failure.txt").write_text('["process 1 was kil')
    assert status_of(run).state == "failed"


def test_one_that_did_all_steps_and_left_no_model_goes_on_to_leave_it(tmp_path):
    assert state(make_run(tmp_path / "a", steps=4, saved=4, finished=False)) == "stopped"


def test_an_evaluation_is_counted_in_answers(tmp_path):
    done = status_of(make_evaluation(tmp_path / "done"))
    assert (done.state, done.step, done.steps, done.metrics["accuracy"]) == ("finished", 4, 4, 0.75)
    half = status_of(make_evaluation(tmp_path / "half", answers=1, finished=False))
    assert (half.state, half.step, half.steps) == ("stopped", 1, 4)


def test_the_time_that_is_left_is_by_the_last_steps_and_not_by_a_pause():
    lines = [{"time": float(time)} for time in (0, 10, 20, 4000, 4010, 4020)]  # it was started anew
    assert seconds_left(lines, 6, now=4020.0) == 60.0
    assert seconds_left(lines, 6, now=4025.0) == 55.0
    assert seconds_left(lines[:1], 6, now=0.0) is None


def test_a_clock_that_was_set_back_tells_nothing_of_the_pace():
    assert seconds_left([{"time": 100.0}, {"time": 40.0}], 6, now=40.0) is None
    assert seconds_left([{"time": time} for time in (100.0, 40.0, 50.0)], 6, now=50.0) == 60.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "config.yaml").write_text("steps: [1, 2"),
        lambda run: (run / "config.yaml").write_text("- a list"),
        lambda run: (run / "config.yaml").write_text("a: web app"),
        lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"),
    ],
)
def test_a_config_that_is_none_of_ours_makes_a_run_unreadable(tmp_path, damage):
    run = make_run(tmp_path / "a")
    damage(run)
    assert state(run) == "unreadable"


def test_torn_and_foreign_lines_of_metrics_are_passed_over(tmp_path):
    run = make_run(tmp_path / "a", steps=2, finished=False, saved=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": "much"}\n[1]\n' + "[" * 5000 + '\n{"step": 2, "rew')
    assert status_of(run).metrics["reward"] == 0.5
    for name in ("metrics.jsonl", "lock", "environment.json"):
        (run / name).unlink()
        (run / name).mkdir()  # worse than damaged
    assert status_of(run).step == 0


def test_settings_of_other_types_than_ours_are_no_failure(tmp_path):
    assert status_of(make_run(tmp_path / "a", settings=RL | {"steps": "many"}, finished=False)).steps == 0
    run = make_evaluation(tmp_path / "b")
    (run / "eval_card.json").write_text('{"metrics": [1]}')
    (run / "sampled_from.json").write_text('{"problems": [1]}')
    assert status_of(run).steps == 0


def test_runs_are_found_at_any_depth_but_not_within_what_a_run_is_made_of(tmp_path):
    make_run(tmp_path / "rl/a")
    make_run(tmp_path / "rl/a/seed=1")  # of a sweep under the same name
    make_run(tmp_path / "rl/a/model/x")
    make_run(tmp_path / "rl/.hidden")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/config.yaml").write_text("of something else")
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["rl/a", "rl/a/seed=1"]
