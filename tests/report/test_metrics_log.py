"""The run's record: every step once, whatever happens in between, and curves that can be looked at."""

import json
import time

import pytest
from PIL import Image

from dirl_cli.report.metrics_log import MetricsLog, NoLog, read_metrics
from dirl_cli.report.plot import Panel, plot, smooth
from dirl_cli.report.progress import StepProgress, due, format_clock, format_metrics, format_shares
from dirl_cli.report.trackers import FileOnly
from dirl_cli.training.trainer import PhaseTimes

NOWHERE = FileOnly().open(None, {}, 0)


def steps(path):
    return [line["step"] for line in map(json.loads, path.read_text().splitlines())]


def test_a_step_that_is_taken_again_is_told_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, NOWHERE)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1 / step})
    log.close()
    resumed = MetricsLog(path, 2, NOWHERE)
    assert steps(path) == [1, 2]
    resumed.write(3, {"loss": 0.5})
    assert steps(path) == [1, 2, 3]
    assert resumed.history[-1].items() > {"step": 3, "loss": 0.5}.items()


def test_a_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, NOWHERE)
    before = time.time()
    log.write(1, {"loss": 2.0})
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert before - 0.001 <= line.pop("time") <= time.time() + 0.001
    assert line == {"step": 1, "loss": 2.0}


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    MetricsLog(path, 2, NOWHERE).write(2, {"loss": 1.0})
    assert steps(path) == [1, 2]


def test_a_process_that_is_not_the_main_one_writes_nothing():
    log = NoLog()
    log.write(1, {"loss": 1.0})
    log.close()


def test_the_plot_is_a_picture_with_what_there_is_to_show(tmp_path):
    history = [{"step": step, "loss": 4 / step} for step in range(1, 101)] + [{"step": 100, "accuracy": 0.5}]
    panels = (Panel("Loss", {"loss": "training", "validation_loss": "validation"}), Panel("?", {"nothing": "nothing"}))
    plot(history, panels, "a run", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size[0] > 1000 and len(set(picture.convert("L").get_flattened_data())) > 50


def test_smoothing_takes_as_many_neighbours_on_either_side():
    assert smooth([0.0, 3.0, 6.0, 0.0, 9.0], reach=1) == pytest.approx([0.0, 3.0, 3.0, 5.0, 9.0])
    assert smooth([1.0, 2.0, 4.0], reach=0) == [1.0, 2.0, 4.0]


def test_outside_a_terminal_progress_is_a_line_every_so_often(capsys):
    progress = StepProgress(steps=5, every=2, names=["loss", "grad_norm", "lr", "tokens_per_s"])
    with progress.after(0):
        for step in range(1, 6):
            progress.update(step, {"loss": 0.5, "lr": 1e-5, "tokens_per_s": 12345.6, "grad_norm": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ·")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert lines[0] == "step 2/5 · 0:00 left · loss 0.5000 · grad 1.00 · lr 1.00e-05 · 12,346 tokens/s"


def test_a_quiet_progress_shows_nothing(capsys):
    progress = StepProgress(steps=1, every=1, names=["loss"], quiet=True)
    with progress.after(0):
        progress.update(1, {"loss": 0.5})
        progress.print_line("hello")
    assert capsys.readouterr().out == ""


def test_what_was_not_measured_makes_no_line(capsys):
    progress = StepProgress(steps=2, every=1, names=[])
    for step in (0, 2):
        progress.note(step, {"loss": 0.5}, "validation_loss")
        progress.note(step, {"loss": 0.5}, "loss")
    progress.sum_up({})
    progress.sum_up({"rows": 65.0})
    assert capsys.readouterr().out.splitlines() == [
        "before · loss 0.5000",
        "step 2/2 · loss 0.5000",
        "1:05 went into rows 100%",
    ]


def test_what_is_due():
    assert [step for step in range(1, 7) if due(step, 3)] == [3, 6]
    assert not due(5, 0)


def test_durations_and_shares_in_words():
    assert format_clock(65) == "1:05" and format_clock(7265) == "2:01:05"
    assert format_metrics({"accuracy": 0.5}, "loss", "accuracy") == "accuracy 50%"
    assert format_shares({"optimizer": 1.0, "rows": 3.0}) == "rows 75% · optimizer 25%"


def test_phases_add_up_and_are_taken_once():
    times = PhaseTimes()
    for _ in range(2):
        with times("rows"):
            pass
    taken = times.take()
    assert set(taken) == {"seconds/rows"} and taken["seconds/rows"] == pytest.approx(times.total["rows"])
    assert times.take() == {}
