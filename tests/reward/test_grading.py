r"""Grading: where the answer is found, and processes that hang, swell or die under it."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from dirl_cli.reward import grading
from dirl_cli.reward.boxed import final_answer, last_boxed, reference
from dirl_cli.reward.grading import Grader, cores, serve
from dirl_cli.reward.verifiers import VERIFIERS
from dirl_cli.types import Problem
from tests.helpers.asked import asked


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{4}, no: $\boxed{ 5 }$.", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"\\boxed{5}", "5"),
        (r"} } \boxed{5} {", "5"),
        (r"\boxed{4} and then \boxed{5", "4"),
        (r"\boxed{1} \text{ and } \boxed{2}", "2"),
        (r"\boxed{5 + \boxed{3}}", "3"),
        (r"$$\boxed{ \text{if } x > 0 \text{ then } \{x\}}$$ and so on", r"\text{if } x > 0 \text{ then } \{x\}"),
        ("\\boxed{\n5\n}", "5"),
        (r"<think>\boxed{4}</think> so it is \boxed{5}.", "5"),
        (r"<think>so it is \boxed{4}</think> It is four.", "4"),
        (r"\fbox{5}", None),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        (r"\boxed 5", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_closed_box_holds_the_answer(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize("text", [r"\boxed{" * 150_000, "{" * 1_000_000, r"\boxed" + " " * 1_000_000, "\\" * 1_000_000])
def test_finding_the_box_takes_linear_time(text: str) -> None:
    assert last_boxed(text) is None  # in quadratic time this would take hours


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{4}, no: $\boxed{ 5 }$.", "5"),
        (r"The roots are $\boxed{1}$ and $\boxed{-2}$.", "1, -2"),
        (r"$\boxed{2}, \boxed{3}$, \text{and} $\boxed{5}$", "2, 3, 5"),
        ("\\[\\boxed{3} \\quad \\text{or} \\quad \\boxed{4}.\\]", "3, 4"),
        (r"$x = \boxed{1}$ and $y_1 = -\boxed{2}$", "x = 1, y_1 = -2"),
        (r"\boxed{1}; then we see that \boxed{2}", "2"),
        (r"\boxed{3} - \boxed{2}", "2"),
        (r"First \boxed{1}. Wait, \boxed{2}", "2"),
        (r"\boxed{1} and " + " " * 100 + r"\boxed{2}", "2"),
        (r"\boxed{5 + \boxed{3}}", "3"),
        (r"$x = -\boxed{5}$", "-5"),
        (r"$-\boxed{5}$", "-5"),
        (r"\[ -\boxed{5} \]", "-5"),
        (r"The answer: - \boxed{5}", "5"),
        ("Answer:\n- \\boxed{5}", "5"),
        (r"\boxed{\ 5\ }", r"\ 5"),
        (r"\boxed{5\\}", r"5\\"),
        (r"\boxed{}", ""),
        ("5", None),
    ],
)
def test_boxes_between_which_nothing_is_said_are_one_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", [r"\boxed{1}, " * 100_000, r"\boxed{" * 100_000 + "}" * 100_000])
def test_many_boxes_take_linear_time(text: str) -> None:
    began = time.monotonic()
    assert final_answer(text) is not None
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2+2=<<2+2=4>>4 eggs.\n#### 4", "4"),
        ("So she has 1200.\n#### 1,200\n", "1,200"),
        (r"We get $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"so $x = -\boxed{5}$", "-5"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        ("#### Step 1\nWe add and get \\boxed{7}.", "7"),
        (" 4 ", "4"),
        ("#4", "#4"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("x####", "x####"),
        (r"\boxed{}", r"\boxed{}"),
        ("", ""),
    ],
)
def test_of_a_reference_that_is_a_solution_the_final_answer_counts(gold: str, answer: str) -> None:
    assert reference(gold) == answer
    assert reference(answer) == answer


def test_a_reference_may_be_a_whole_solution() -> None:
    gsm8k, math = asked("2+2=4\n#### 4"), asked(r"We get $\boxed{4}$.")
    items = [("gsm8k", gsm8k, r"\boxed{4}"), ("math", math, r"\boxed{4.0}")]
    items += [("wrong", gsm8k, r"\boxed{2}"), ("sign", asked("5"), r"$-\boxed{5}$")]
    with Grader(workers=1) as grader:
        assert dict(grader.grade(items)) == {"gsm8k": True, "math": True, "wrong": False, "sign": False}


HOSTILE = [
    (r"\boxed{9^{9^{9^{9}}}}", False),
    (r"\boxed{100000000!}", False),
    (r"\boxed{" + "(" * 10_000 + "5" + ")" * 10_000 + "}", False),
    (r"\boxed{" + "(" * 900 + "5" + ")" * 900 + "}", False),
    (r"\boxed{" + "{" * 900 + "6" + "}" * 900 + "}", False),
    (r"\boxed{" + r"\sqrt{" * 300 + "6" + "}" * 300 + "}", False),
    (r"\boxed{" + "1+" * 500_000 + "1}", False),
    (r"\boxed{" + "7" * 10_000 + "}", False),
    (r"\boxed{" + ", ".join(map(str, range(400))) + "}", False),
    ("x" * 1_000_000 + r"\boxed{5}", True),
    ("x" * 1_000_000 + r"\boxed{\sqrt{25}}", True),
    ("no box", False),
    ("\\boxed{\x00\ud800}", False),
]


def test_hostile_answers_cost_their_timeout_and_no_other_verdict() -> None:
    items = [(i, asked("5"), text) for i, (text, _) in enumerate(HOSTILE)]
    fair = [(f"fair {i}", asked(r"\sqrt{8}"), rf"\boxed{{\sqrt{{{i}}} \cdot \sqrt{{2}}}}") for i in range(8)]
    with Grader(workers=2, timeout=4.0) as grader:
        verdicts = dict(grader.grade([*items, *fair]))
        assert [verdicts[i] for i in range(len(HOSTILE))] == [right for _, right in HOSTILE]
        assert [verdicts[key] for key, _, _ in fair] == [i == 4 for i in range(8)]
        assert grader.gave_up >= 2  # the towers of powers at least; on a slow machine more


def test_verdicts_come_under_their_keys_while_others_are_submitted() -> None:
    with Grader(workers=1, timeout=30.0) as grader:
        grader.submit("slow", asked(r"\sqrt{8}"), r"\boxed{2\sqrt{2}}")
        grader.submit("quick", asked("5"), r"\boxed{5}")
        assert dict(grader.finished()) == {"quick": True}
        assert dict(grader.rest()) == {"slow": True}
        assert not list(grader.finished()) and not list(grader.rest())


def test_plain_answers_start_no_process() -> None:
    with Grader() as grader:
        assert all(right for _, right in grader.grade((i, asked(str(i)), rf"\boxed{{{i}.0}}") for i in range(100)))
        assert multiprocessing.active_children() == []


def test_there_is_a_process_per_core() -> None:
    assert len(Grader()._processes) == cores() == len(os.sched_getaffinity(0))
    assert len(Grader(workers=3)._processes) == 3


def test_a_grader_that_is_left_early_leaves_no_process_and_does_not_wait() -> None:
    began = time.monotonic()
    with Grader(workers=2, timeout=60.0) as grader:
        for key in range(6):
            grader.submit(key, asked("5"), r"\boxed{9^{9^{9^{9}}}}")
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.01)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - began < 20


def answers(n: int, plain: int) -> Iterator[tuple[int, Problem, str]]:
    """Answers, of which the even ones are right, and all but one in `plain` are plain."""
    for i in range(n):
        if i % plain:
            yield i, asked(str(i)), rf"so it is \boxed{{{i + i % 2}}}."
        else:
            yield i, asked(rf"{i + 2}\sqrt{{2}}"), rf"so it is \boxed{{\sqrt{{{2 * (i + 2) ** 2 + i % 2}}}}}."


def grade_and_kill(n: int, plain: int, every: int) -> tuple[list[tuple[int, float]], int]:
    """The verdicts on `answers`, a worker chosen at random being killed after every so many that needed one."""
    chance, verdicts, killed, needed = random.Random(0), [], 0, 0
    with Grader(workers=2, timeout=30.0) as grader:
        for key, right in grader.grade(answers(n, plain)):
            assert isinstance(key, int)
            verdicts.append((key, right))
            needed += key % plain == 0
            if key % plain == 0 and needed % every == 0 and (alive := multiprocessing.active_children()):
                os.kill(chance.choice(alive).pid or 0, signal.SIGKILL)
                killed += 1
                time.sleep(0.7)  # verdicts come in bursts, and one answer survives only so many deaths
        assert grader.gave_up == 0
    return verdicts, killed


def test_an_answer_outlives_the_worker_that_is_killed_under_it() -> None:
    verdicts, killed = grade_and_kill(60, plain=1, every=20)
    assert sorted(verdicts) == [(i, i % 2 == 0) for i in range(60)]
    assert killed >= 2


@pytest.mark.slow
def test_ten_thousand_answers_have_one_verdict_each_whoever_is_killed() -> None:
    verdicts, killed = grade_and_kill(10_000, plain=9, every=50)
    assert sorted(verdicts) == [(i, i % 2 == 0) for i in range(10_000)]
    assert killed >= 5  # a worker that was killed before may not have started anew when its turn comes


def test_an_answer_under_which_every_worker_dies_is_given_up() -> None:
    with Grader(workers=1, timeout=30.0) as grader:
        grader.submit("deadly", asked("5"), r"\boxed{9^{9^{9^{9}}}}")
        for _ in range(grading.ATTEMPTS):
            while not (alive := multiprocessing.active_children()):
                time.sleep(0.01)
            time.sleep(0.3)
            os.kill(alive[0].pid or 0, signal.SIGKILL)
            alive[0].join()
        assert dict(grader.rest()) == {"deadly": False}
        assert grader.gave_up == 1


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_running_out_of_memory_or_stack_is_giving_up(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def swollen(problem: Problem, answer: str) -> float:
        if answer == "bomb":
            raise error
        return 1.0

    monkeypatch.setitem(VERIFIERS, "math", replace(VERIFIERS["math"], credit=swollen))
    monkeypatch.setattr(grading, "prepare_grading_worker", lambda: None)
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(theirs, 60.0))
    thread.start()
    assert ours.recv() is None  # ready
    verdicts = []
    for answer in ("bomb", "5"):
        ours.send((asked("5"), answer))
        verdicts.append(ours.recv())
    ours.close()
    thread.join(10)
    assert verdicts == [None, True] and not thread.is_alive()


def stillborn(pipe: Connection, seconds: float) -> None:
    pipe.close()


def test_a_worker_that_cannot_start_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "serve", stillborn)
    with Grader(workers=1) as grader:
        with pytest.raises(EOFError):
            list(grader.grade([("key", asked(r"\sqrt{8}"), r"\boxed{2\sqrt{2}}")]))
        assert grader._processes[0]._pipe.closed


ORPHAN = r"""
import os, signal, time
from dirl_cli.reward.grading import Grader
from dirl_cli.types import Problem

if __name__ == "__main__":
    grader = Grader(workers=1)
    grader.submit("key", Problem("", "", r"\sqrt{8}"), r"\boxed{2\sqrt{2}}")
    time.sleep({seconds})
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("seconds", [0.2, 0.8])
def test_a_worker_whose_parent_is_killed_ends_without_a_word(tmp_path: Path, seconds: float) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN.replace("{seconds}", str(seconds)))
    ended = subprocess.run(
        [sys.executable, script], stderr=subprocess.PIPE, text=True, timeout=60
    )  # to the last writer
    assert ended.returncode == -signal.SIGKILL
    assert "Traceback" not in ended.stderr
