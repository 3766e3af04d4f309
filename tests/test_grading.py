r"""Grading: where the answer is found, hard pairs right and wrong, and answers made to break a grader."""

import json
import time
from pathlib import Path

import pytest

from dirl_cli.reward.boxed import last_boxed
from dirl_cli.reward.equality import plainly_equal, verified
from dirl_cli.reward.grading import Grader

SHARED = Path(__file__).parents[2] / "shared" / "data"


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


def test_only_whole_numbers_and_equal_texts_are_plain() -> None:
    assert plainly_equal("12", "012") is plainly_equal("+3", "3") is plainly_equal("x", "x") is True
    assert plainly_equal("12", "13") is plainly_equal("-1", "1") is plainly_equal("", "") is False
    assert plainly_equal("12", "12.0") is plainly_equal("1,000", "1000") is None


RIGHT = [  # gold, answer
    ("1/2", "0.5"),
    (r"\frac12", r"\dfrac{1}{2}"),
    (r"\frac{1}{3}", "0.333333"),
    (r"1\frac{3}{4}", "1.75"),
    ("1,000", "1000"),
    ("1200", r"1{,}200"),
    ("1200", r"1\,200"),
    ("18", r"\$18.00"),
    ("18", "18 dollars"),
    ("12", r"12 \text{ cm}^2"),
    ("12", "12 cm^2"),
    (r"11,\! 111,\! 100", "11111100"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"$69$,$84$", "69, 84"),
    ("50", r"50\%"),
    (r"50\%", "50"),
    ("90", r"90^\circ"),
    ("5", "5."),
    ("5", "**5**"),
    ("5", "$5$"),
    ("5", "x = 5"),
    ("x=5", "5"),
    ("5", "2+3"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("p - q", "-q+p"),
    ("y=2x+3", "2x+3"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{east}", "East"),
    (r"\text{(C)}", "C"),
    ("52_8", "52_{8}"),
    ("3, 4", "4, 3"),
    ("3, 4", r"3 \text{ and } 4"),
    (r"\{1,2\}", "2,1"),
    (r"\pm 2", "2, -2"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("(4,3)", "(4, 3)"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    ("[2,5)", r"\left[2, 5\right)"),
    (r"x<2", r"(-\infty, 2)"),
    (r"(0,9)\cup(9,36)", r"(0,9) \cup (9,36)"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\frac{n(n+1)}{2}", "n(n+1)/2"),
]
WRONG = [
    ("3, 4", "3, 5"),
    ("3, 4", "4"),
    ("3, 4", "3, 4, 5"),
    ("5", "3, 5"),
    ("5", "1,2,3,4,5"),
    ("5", r"5 \text{ or } 6"),
    ("5", r"x \ne 5"),
    ("5", r"x \le 5"),
    ("5", r"6 \to 5"),
    ("5", "I think it is 5"),
    ("5", "5 = 3"),
    ("2", r"\pm 2"),
    ("2", "2x"),
    ("2", "2.0001"),
    ("12", "1 2"),
    ("(4,3)", "(3,4)"),
    ("(4,3)", "(5,2)"),
    ("(3,3)", "(4,4)"),
    ("(3,4)", "4, 3"),
    ("[2,5)", "[2,5]"),
    ("x<2", "x>2"),
    ("p - q", "q - p"),
    ("1+2i", "1-2i"),
    ("3x+2", "3y+2"),
    ("x+1", "f(x)=x+2"),
    ("east", "seat"),
    (r"\text{odd}", r"\text{even}"),
    ("52_8", "52_9"),
    ("0.5", r"50\%"),
    (r"\frac10", r"\frac20"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    ("3", ""),
    ("", ""),
    ("", "3"),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_two_ways_to_write_an_answer_are_equal(gold: str, answer: str) -> None:
    assert verified(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_a_wrong_answer_is_not_equal(gold: str, answer: str) -> None:
    assert not verified(gold, answer)


HOSTILE = [
    (r"\boxed{9^{9^{9^{9}}}}", False),
    (r"\boxed{100000000!}", False),
    (r"\boxed{" + "(" * 10_000 + "5" + ")" * 10_000 + "}", False),
    (r"\boxed{" + "(" * 900 + "5" + ")" * 900 + "}", False),
    (r"\boxed{" + "{" * 900 + "6" + "}" * 900 + "}", False),
    (r"\boxed{" + "1+" * 500_000 + "1}", False),
    ("x" * 1_000_000 + r"\boxed{5}", True),
    ("x" * 1_000_000 + r"\boxed{2+3}", True),
    ("no box", False),
    ("\\boxed{\x00\ud800}", False),
]


def test_hostile_answers_cost_their_timeout_and_no_other_verdict() -> None:
    began = time.monotonic()
    items = [(i, "5", text) for i, (text, _) in enumerate(HOSTILE)]
    fair = [(f"fair {i}", r"\frac{1}{2}", rf"\boxed{{{i}/8}}") for i in range(8)]
    with Grader(workers=2, timeout=2.0) as grader:
        verdicts = dict(grader.grade([*items, *fair]))
        assert [verdicts[i] for i in range(len(HOSTILE))] == [right for _, right in HOSTILE]
        assert [verdicts[key] for key, _, _ in fair] == [i == 4 for i in range(8)]
        assert 2 <= grader.gave_up <= 4
    assert time.monotonic() - began < 30


def test_verdicts_come_under_their_keys_while_others_are_submitted() -> None:
    with Grader(workers=1, timeout=30.0) as grader:
        grader.submit("slow", "0.5", r"\boxed{\frac{1}{2}}")
        grader.submit("quick", "5", r"\boxed{5}")
        assert dict(grader.finished()) == {"quick": True}
        assert dict(grader.rest()) == {"slow": True}
        assert not list(grader.finished()) and not list(grader.rest())


def test_a_grader_that_is_left_early_leaves_no_process() -> None:
    with Grader(workers=1, timeout=60.0) as grader:
        grader.submit("hang", "5", r"\boxed{9^{9^{9^{9}}}}")
    assert not grader._pool.active


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real benchmark files of ../shared/data are not here")
@pytest.mark.parametrize("name", ["MATH500", "OlympiadBench", "AIME2025", "GSM8K"])
def test_real_answers_are_right_for_themselves_and_wrong_for_their_neighbours(name: str) -> None:
    golds = [row["ground_truth_answer"] for row in json.loads((SHARED / f"{name}.json").read_text())][:60]
    own = [(("own", i), gold, rf"so it is $\boxed{{{gold} }}$.") for i, gold in enumerate(golds)]
    pairs = zip(golds, golds[1:] + golds[:1], strict=True)
    differing = [(gold, other) for gold, other in pairs if gold != other.removeprefix("x=")]
    next_one = [(("next", i), gold, rf"\boxed{{{other}}}") for i, (gold, other) in enumerate(differing)]
    with Grader(workers=2, timeout=10.0) as grader:
        verdicts = dict(grader.grade([*own, *next_one]))
    assert all(verdicts[key] for key, _, _ in own)
    assert [(gold, text) for key, gold, text in next_one if verdicts[key]] == []
