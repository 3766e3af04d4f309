"""What graded answers are condensed to, on numbers small enough to check by hand."""

from dataclasses import replace
from itertools import combinations
from math import sqrt
from random import Random
from statistics import fmean

import pytest

from dirl_cli.evaluation.answers import GradedAnswer
from dirl_cli.evaluation.metrics import majority, measure, measure_subsets, pass_at, standard_error, wilson_interval
from dirl_cli.evaluation.report import metric_cells
from dirl_cli.types import Problem

ANSWER = GradedAnswer("a", 0, "", False, "stop", 10, 12, 6, 8, 0.5)


def answers(verdicts: dict[str, list[bool]]) -> list[GradedAnswer]:
    """Answers of each problem, right or wrong as listed."""
    return [
        replace(ANSWER, problem=problem, sample=i, correct=right)
        for problem, row in verdicts.items()
        for i, right in enumerate(row)
    ]


def test_accuracy_is_the_mean_over_problems_and_its_error_their_spread() -> None:
    metrics = measure(answers({"a": [True, True], "b": [True, False], "c": [False, False]}))
    assert (metrics.problems, metrics.answers) == (3, 6)
    assert metrics.accuracy == 0.5
    assert metrics.standard_error == pytest.approx(0.5 / sqrt(3))  # shares 1, ½, 0: s = ½


def test_the_standard_error_of_zeros_and_ones_is_the_binomial_one() -> None:
    values = [1.0] * 30 + [0.0] * 70
    assert standard_error(values) == pytest.approx(sqrt(0.3 * 0.7 / 99))
    assert standard_error([1.0]) is None


def test_the_interval_is_wilsons_where_each_problem_has_one_answer() -> None:
    """3 of 3: 3 ÷ (3 + z²). 81 of 263: 0.2553 to 0.3662 (Newcombe, Statistics in Medicine 17, 1998, method 3)."""
    z = 1.959964
    assert wilson_interval([1.0] * 3, 3) == pytest.approx((3 / (3 + z**2), 1.0), abs=1e-6)
    assert wilson_interval([0.0] * 100, 100) == pytest.approx((0.0, z**2 / (100 + z**2)), abs=1e-6)
    assert wilson_interval([1.0] * 81 + [0.0] * 182, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_the_interval_of_several_answers_counts_problems_and_what_answers_add_to_them() -> None:
    def width(shares: list[float], k: int) -> float:
        low, high = wilson_interval(shares, k * len(shares))
        return high - low

    once = width([1.0] * 10 + [0.0] * 10, 1)
    assert width([1.0] * 10 + [0.0] * 10, 16) == pytest.approx(once)  # a problem is solved always or never
    assert width([1.0] * 20, 16) == pytest.approx(width([1.0] * 20, 1))
    mixed = [i / 4 for i in (0, 1, 1, 2, 2, 2, 2, 3, 3, 4)] * 4
    error = standard_error(mixed)
    assert width(mixed, 4) == pytest.approx(2 * 1.96 * error, rel=0.05)  # wide sets: the same as ± 1.96 s.e.
    assert width([0.25, 0.75] * 10, 4) > width([0.0, 1.0] * 40, 1)  # alike, yet no more than all answers say


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Of 200 sets of 30 hard problems, with chances of 0.02 to 0.06 each; ± 1.96 s.e. holds it in 70 % of them."""
    random = Random(0)
    chances = [0.02 + 0.04 * i / 29 for i in range(30)]
    sets = [[float(random.random() < chance) for chance in chances] for _ in range(200)]
    held = [low <= 0.04 <= high for low, high in (wilson_interval(shares, 30) for shares in sets)]
    usual = [abs(fmean(shares) - 0.04) <= 1.96 * (standard_error(shares) or 0) for shares in sets]
    assert fmean(held) >= 0.93 and fmean(usual) < 0.75


def test_speed_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    quick = replace(ANSWER, tokens=4, denoise_forwards=1, forwards=2, seconds=0.1)
    slow = replace(ANSWER, problem="b", tokens=12, denoise_forwards=7, forwards=8, seconds=0.3)
    metrics = measure([quick, slow])
    assert metrics.tokens_per_denoising_forward == 16 / 8
    assert metrics.tokens_per_forward == 16 / 10
    assert metrics.tokens_per_second == pytest.approx(16 / 0.4)


def test_length_and_truncation_are_means_over_answers() -> None:
    metrics = measure([ANSWER, replace(ANSWER, problem="b", length=30, stop_reason="length")])
    assert (metrics.length, metrics.truncated) == (20, 0.5)


def test_pass_at_m_is_the_share_of_subsets_with_a_right_answer() -> None:
    samples = [True, True, False, False, False]
    for m in range(1, 6):
        subsets = list(combinations(samples, m))
        assert pass_at(m, 5, 2) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_pass_at_is_given_for_powers_of_two_and_k() -> None:
    metrics = measure(answers({"a": [True, False, False], "b": [False] * 3}))
    assert metrics.pass_at == pytest.approx({1: 1 / 6, 2: 1 / 3, 3: 1 / 2})
    assert measure([ANSWER]).pass_at == {} and measure([ANSWER]).majority is None


@pytest.mark.parametrize(
    ("boxes", "right"),
    [
        (["5", "5", "6"], 1.0),
        (["6", "6", "5"], 0.0),
        (["5", " 5 ", "6", "6 "], 0.5),
        (["5", "\\frac{10}{2}", "5.0", "6", "6"], 1.0),  # the same number
        (["(1,\\, 5)", "\\left(1, 5\\right)", "6"], 1.0),  # the same text
        (["5", "6", "7"], 1 / 3),
        ([None, None, "5"], 1.0),
        ([None, None], 0.0),
    ],
)
def test_the_majority_is_right_when_the_most_frequent_box_is(boxes: list[str | None], right: float) -> None:
    texts = ["no box" if box is None else rf"so \boxed{{{box}}}" for box in boxes]
    group = [replace(ANSWER, sample=i, text=text, correct="5" in text or "10" in text) for i, text in enumerate(texts)]
    assert majority(group) == pytest.approx(right)


def test_an_answer_that_was_cut_off_does_not_make_its_equals_wrong() -> None:
    whole = replace(ANSWER, text=r"\boxed{5}", correct=True)
    assert majority([whole, replace(whole, correct=False, stop_reason="length")]) == 1.0


def test_problems_may_have_different_numbers_of_answers() -> None:
    metrics = measure(answers({"a": [True, True, False], "b": [False, True]}))
    assert metrics.answers == 5
    assert metrics.accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics.pass_at == pytest.approx({1: (2 / 3 + 1 / 2) / 2, 2: 1.0})


def test_of_answers_that_are_only_text_no_speed_is_known() -> None:
    metrics = measure([replace(ANSWER, length=0, tokens=0, denoise_forwards=0, forwards=0, seconds=0.0)])
    assert metrics.length is metrics.truncated is metrics.tokens_per_forward is metrics.tokens_per_second is None


def test_credit_is_the_mean_over_problems_where_every_answer_was_given_some() -> None:
    credits = {"a": [1.0, 0.5], "b": [0.25]}
    partly = [
        replace(ANSWER, problem=name, sample=i, credit=c) for name in credits for i, c in enumerate(credits[name])
    ]
    assert measure(partly).credit == 0.5
    assert measure([*partly, ANSWER]).credit is None


def test_credit_is_shown_where_it_is_not_the_accuracy() -> None:
    whole = replace(ANSWER, correct=True, credit=1.0)
    assert metric_cells(measure([whole, replace(ANSWER, problem="b", credit=0.5)]), "1")["credit %"] == "75.0"
    assert metric_cells(measure([whole, replace(ANSWER, problem="b", credit=0.0)]), "1")["credit %"] == ""
    assert metric_cells(measure([ANSWER]), "1")["credit %"] == ""


def test_an_answer_without_a_box_votes_as_its_verifier_reads_it() -> None:
    right = replace(ANSWER, text="7*(3+5)", extracted="7*(3+5)", correct=True)
    assert majority([right, replace(right, sample=1), replace(ANSWER, text="3", extracted="3")]) == 1


def test_of_what_is_written_differently_and_says_the_same_no_majority_is_told() -> None:
    kinds = {"a": "math", "b": "code", "c": "my_scorers.words"}
    problems = [Problem(name, "", "", name, verifier=verifier) for name, verifier in kinds.items()]
    graded = answers({name: [True, False, True] for name in kinds})
    subsets = measure_subsets(graded, problems)
    assert {name: part.majority is None for name, part in subsets.items()} == {"a": False, "b": True, "c": True}
    assert subsets["b"].pass_at == subsets["a"].pass_at
    assert measure(graded).majority is not None and measure(graded, with_votes=False).majority is None


def test_subsets_are_measured_apart_and_without_a_speed_of_their_own() -> None:
    problems = [Problem(name, "", "", subset) for name, subset in [("a", "seen"), ("b", "unseen"), ("c", "seen")]]
    graded = answers({"a": [True], "b": [False], "c": [True]})
    subsets = measure_subsets(graded, problems)
    assert {name: (part.problems, part.accuracy) for name, part in subsets.items()} == {
        "seen": (2, 1),
        "unseen": (1, 0),
    }
    assert subsets["seen"].tokens_per_second is None
    assert measure_subsets(graded[:1], problems[:1]) == {}
