"""Public cases of grading with what a careful mathematician says of each: shared/cases/grading.jsonl."""

import json

import pytest

from dirl_cli.reward.boxed import final_answer, reference
from dirl_cli.reward.equality import plainly_equal, verified
from tests.helpers.paths import SHARED

FILE = SHARED / "cases" / "grading.jsonl"
CASES = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []
WRONG = [case for case in CASES if not case["should"]]

pytestmark = pytest.mark.skipif(not CASES, reason="needs ../shared/cases/grading.jsonl")


def judged(case: dict) -> bool:
    answer = final_answer(case["completion"])
    return answer is not None and verified(reference(case["gold"]), answer)


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case['gold']} {case['completion'][-40:]}")
def test_no_wrong_answer_is_right(case: dict) -> None:
    assert not judged(case)


def test_of_all_answers_97_in_100_are_judged_as_they_should() -> None:
    amiss = [(case["gold"], case["completion"]) for case in CASES if judged(case) != case["should"]]
    assert len(amiss) <= 0.03 * len(CASES), amiss


def test_the_quick_path_never_says_otherwise() -> None:
    for case in CASES:
        gold, answer = reference(case["gold"]), final_answer(case["completion"]) or ""
        assert plainly_equal(gold, answer) in (None, judged(case))
