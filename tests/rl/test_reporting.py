"""A step's answers are written while the policy is updated, and are on the disk before a checkpoint counts on them."""

import threading

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.report.progress import StepProgress
from dirl_cli.rl import reporting
from dirl_cli.rl.reporting import RolloutReport
from dirl_cli.rollout.storage import Record, read_rollout, rollout_path
from dirl_cli.types import Problem, Trajectory

ANSWER = Record(Problem("a", "1+1?", "2"), 0, "2", Trajectory([1], [9], [1], [-0.5], "stop", 1, 1), advantage=1.0)


def report(directory) -> RolloutReport:
    return RolloutReport(directory, 0, True, StepProgress(1, 1, [], quiet=True))


def test_the_step_goes_on_while_its_answers_are_written(tmp_path, monkeypatch):
    may_write = threading.Event()
    write_rollout = reporting.write_rollout

    def slow(path, records):
        assert may_write.wait(timeout=60)
        write_rollout(path, records)

    monkeypatch.setattr(reporting, "write_rollout", slow)
    ours = report(tmp_path)
    ours.write(1, [[ANSWER]], [[ANSWER]])
    assert list(tmp_path.iterdir()) == []
    may_write.set()
    ours.wait()
    assert read_rollout(rollout_path(tmp_path, 1)) == [ANSWER]


def test_every_file_is_there_at_the_end(tmp_path):
    with report(tmp_path) as ours:
        for step in (1, 2, 3):
            ours.write(step, [[ANSWER]], [[ANSWER]])
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-00000{step}.jsonl" for step in (1, 2, 3)]


@pytest.mark.parametrize("leave", [lambda ours: ours.wait(), lambda ours: ours.write(2, [], [])])
def test_what_cannot_be_written_is_told_before_the_run_counts_on_it(tmp_path, leave):
    (tmp_path / "file").write_text("")
    ours = report(tmp_path / "file")
    ours.write(1, [[ANSWER]], [[ANSWER]])
    with pytest.raises(DirlError, match=r"cannot be written .*: make room or give out=DIR another disk"):
        leave(ours)
    ours.wait()  # told once


def test_why_a_run_ended_is_told_and_not_that_its_answers_could_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="the update"), report(tmp_path / "file") as ours:
        ours.write(1, [[ANSWER]], [[ANSWER]])
        raise ValueError("the update")
