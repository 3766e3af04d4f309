"""Whatever takes long shows that it lives, and what it shows fits the terminal."""

import io
import os
import signal
import time

import pytest
from accelerate import Accelerator
from omegaconf import OmegaConf

from dirl_cli import console as console_module
from dirl_cli.cli import processes
from dirl_cli.console import PlainConsole, working
from dirl_cli.errors import Interrupted
from dirl_cli.evaluation import held_out, report
from dirl_cli.evaluation.held_out import HeldOutEval
from dirl_cli.report.progress import StepProgress
from dirl_cli.training.stop_signal import StopSignal
from dirl_cli.types import Decoding, Problem
from tests.helpers.small import small_lm


def console(**options):
    return PlainConsole(file=io.StringIO(), width=80, **options)


def test_what_takes_long_is_told_with_a_count_and_ever_more_rarely(monkeypatch):
    monkeypatch.setattr(console_module, "PATIENCE", 0.1)
    shown = console()
    with working(shown, "answering", 5) as count:
        count(3)
        time.sleep(0.5)  # lines at 0.1, 0.2, 0.3, 0.45
    lines = shown.file.getvalue().splitlines()
    assert lines[0] == "answering · 3 of 5 · 0:00 so far"
    assert 2 <= len(lines) <= 4


def test_what_is_quick_says_nothing():
    shown = console()
    with working(shown, "answering"):
        pass
    assert shown.file.getvalue() == ""


def test_a_failure_ends_the_signs_of_life(monkeypatch):
    monkeypatch.setattr(console_module, "PATIENCE", 0.05)
    shown = console()
    with pytest.raises(ZeroDivisionError), working(shown, "dividing"):
        raise ZeroDivisionError
    time.sleep(0.1)
    assert shown.file.getvalue() == ""


def test_a_table_that_does_not_fit_is_written_row_by_row():
    rows = {f"level {i}": {"problems": "500", "accuracy %": "60.1 ± 2.2", "tokens": "123.45"} for i in (1, 2)}
    drawn = report.draw("tiny on arithmetic", rows, "subset", caption="what it means")
    wide, narrow = console(), PlainConsole(file=io.StringIO(), width=30)
    wide.print(drawn)
    narrow.print(drawn)
    assert "level 1      500" in wide.file.getvalue()
    text = " ".join(narrow.file.getvalue().split())
    assert "level 2: problems 500, accuracy % 60.1 ± 2.2, tokens 123.45" in text
    assert "tiny on arithmetic" in text and "what it means" in text


def test_processes_that_start_say_whom_they_wait_for():
    one = OmegaConf.create({"gpus": 64, "nodes": 1})
    assert processes.starting(one, None) == "starting 64 processes"
    assert processes.starting(one, 2) == "starting 64 processes, which take turns on 2 CPU cores"
    two = OmegaConf.create({"gpus": 1, "nodes": 2, "node_rank": 0, "main_address": "localhost"})
    assert processes.starting(two, 1) == "starting a process as machine 0; waits for machine 1 at localhost:29500"
    four = OmegaConf.create({"gpus": 8, "nodes": 4, "node_rank": 1, "main_address": "a:4000"})
    told = "starting 8 processes as machine 1; waits for machine 0, machine 2 and machine 3 at a:4000"
    assert processes.starting(four, 8) == told


def test_a_wish_to_stop_ends_an_evaluation_between_its_problems(monkeypatch, capfd):
    """And what is known of some of the problems is not told as if it were of all."""
    answered = []

    def graded(answers, problems, decode, grader):
        for problem in problems:
            if len(answered) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            answered.append(problem)
            yield type("Answer", (), {"correct": True, "credit": 1.0})

    class Sampler:
        def stream(self, *args):
            return iter(())

    monkeypatch.setattr(held_out, "graded", graded)
    lm, accelerator = small_lm(), Accelerator(cpu=True)
    monkeypatch.setattr(type(lm), "require_tokenizer", lambda self: None)
    monkeypatch.setattr(held_out, "answer_text", lambda tokenizer, ids: "")
    problems = [Problem(str(i), "1+1?", "2") for i in range(5)]
    with StopSignal(accelerator) as stop:
        asked = (problems, [[1]] * 5, lm, Decoding(), accelerator, StepProgress(5, 1, (), quiet=True), stop.raising)
        with pytest.raises(Interrupted):
            HeldOutEval(*asked).run(Sampler(), None)
        assert stop.received == signal.SIGTERM
    assert len(answered) == 2
    with StopSignal(accelerator) as stop:
        answered[:] = [None] * 3
        assert HeldOutEval(*asked[:-1], stop.raising).run(Sampler(), None) == {"greedy_accuracy": 1.0}


def test_where_answers_can_be_right_in_part_their_mean_credit_is_measured_too(monkeypatch):
    """Whether it is told depends on the problems alone, so that a metric does not come and go."""

    def graded(answers, problems, decode, grader):
        for credit in (1.0, 0.5, 0.0, None):
            yield type("Answer", (), {"correct": credit == 1, "credit": credit})

    class Sampler:
        def stream(self, *args):
            return iter(())

    monkeypatch.setattr(held_out, "graded", graded)
    lm, accelerator = small_lm(), Accelerator(cpu=True)
    monkeypatch.setattr(type(lm), "require_tokenizer", lambda self: None)
    for verifier, measured in (
        ("math", {}),
        ("sudoku", {"greedy_credit": 0.375}),
        ("mine.score", {"greedy_credit": 0.375}),
    ):
        problems = [Problem(str(i), "?", "2", verifier=verifier) for i in range(4)]
        asked = (problems, [[1]] * 4, lm, Decoding(), accelerator, StepProgress(5, 1, (), quiet=True))
        assert HeldOutEval(*asked).run(Sampler(), None) == {"greedy_accuracy": 0.25, **measured}
