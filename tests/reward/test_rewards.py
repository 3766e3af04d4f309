"""The built-in rewards, by hand at their ends and in between."""

from math import cos, pi

import pytest

from dirl_cli.reward.rewards import (
    Answer,
    accuracy,
    between,
    binary,
    boxed,
    cosine,
    format,
    length,
    repetition,
    soft_overlong,
    speed,
    speed_penalty,
)
from dirl_cli.types import Problem, Trajectory

PROBLEM = Problem("p", "7+5?", "12")


def answer(
    completion: str = "",
    verified: bool = True,
    length: int = 10,
    truncated: bool = False,
    tokens_per_step: float = 1.0,
    max_new_tokens: int = 100,
    block_size: int = 4,
) -> Answer:
    return Answer(PROBLEM, completion, length, truncated, tokens_per_step, max_new_tokens, block_size, verified)


def approx(value: float):
    return pytest.approx(value, abs=1e-12)


def test_an_answer_is_what_its_trajectory_holds():
    trajectory = Trajectory([1], [5, 6, 2, 7, 7, 7, 7, 7], [1, 1, 2, 1, 1, 1, 1, 1], [0.0] * 8, "stop", 3, 5, 0, (2,))
    one = Answer.of(PROBLEM, trajectory, "5 6", max_new_tokens=8, block_size=4)
    assert (one.completion, one.length, one.truncated, one.verified) == ("5 6", 2, False, False)
    assert one.tokens_per_step == approx(8 / 3)


def test_correct_means_complete_too_and_former_names_still_work():
    cut, whole = answer(truncated=True, length=7), answer(length=7)
    assert (cut.verified, cut.correct, cut.right) == (True, False, False)
    assert (whole.verified, whole.correct, whole.right) == (True, True, True)
    assert cut.tokens == 7


def test_accuracy_is_one_for_a_right_answer_that_was_not_cut_off():
    assert [accuracy(answer()), accuracy(answer(verified=False)), accuracy(answer(truncated=True))] == [1, 0, 0]


def test_binary_is_plus_or_minus_one():
    assert [binary(answer()), binary(answer(verified=False)), binary(answer(truncated=True))] == [1, -1, -1]


@pytest.mark.parametrize(
    "completion, value", [(r"\boxed{12}", 0.1), (r"\boxed{}", 0.1), (r"\boxed{12", 0), ("12", 0), ("", 0)]
)
def test_boxed_pays_for_a_closed_box_whatever_is_in_it(completion, value):
    assert boxed(answer(completion, verified=False)) == value
    assert boxed(answer(completion), value=2) == 20 * value


@pytest.mark.parametrize(
    "completion, value",
    [
        ("<think>hm</think>12", 1),
        ("\n<think>\n</think>\n12\n", 1),
        ("<think>hm</think>", 0),
        ("<think>hm</think>\n", 0),
        ("well <think>hm</think>12", 0),
        ("<think>hm</think>12</think>", 0),
        ("<think><think>hm</think>12", 0),
        ("</think><think>12", 0),
        ("hm</think>12", 0),
        ("12", 0),
    ],
)
def test_format_wants_one_thought_then_an_answer(completion, value):
    assert format(answer(completion)) == value


def test_format_of_a_thought_that_the_prompt_opened():
    assert format(answer("hm</think>12"), opened=True) == 1
    assert format(answer("<think>hm</think>12"), opened=True) == 0


def test_between_follows_half_a_cosine_and_stays_at_its_end():
    assert [between((2, 4), t, 6) for t in (0, 2, 3, 6, 9)] == [2, approx(2.5), approx(3), 4, 4]
    assert between((2, 4), 0, 0) == 2


@pytest.mark.parametrize(
    "tokens, right, wrong",
    [(0, 1, -0.5), (50, 0.75, -0.25), (100, 0.5, 0), (103, 0.5, 0), (25, 1 - (1 - cos(pi / 4)) / 4, None)],
)
def test_cosine_prefers_short_right_and_long_wrong_answers(tokens, right, wrong):
    assert cosine(answer(length=tokens)) == approx(right)
    if wrong is not None:
        assert cosine(answer(length=tokens, verified=False)) == approx(wrong)


def test_cosine_of_a_truncated_answer_is_fixed():
    assert cosine(answer(length=100, truncated=True)) == -0.5
    assert cosine(answer(length=3, truncated=True, verified=False)) == -0.5
    assert cosine(answer(length=100, truncated=True), truncated=-2) == -2


def test_cosine_takes_other_ends():
    assert cosine(answer(length=50), right=(3, 1)) == approx(2)
    assert cosine(answer(length=50, verified=False), wrong=(-4, -2)) == approx(-3)


@pytest.mark.parametrize(
    "completion, value",
    [
        ("", 0),
        ("a b", 0),
        ("a b c", 0),
        ("a b c a b c", -(1 - 3 / 4)),  # abc bca cab abc
        ("a A a a a", -(1 - 1 / 3)),
        ("a\nb  c\ta b c", -(1 - 3 / 4)),
    ],
)
def test_repetition_is_minus_the_share_of_trigrams_seen_before(completion, value):
    assert repetition(answer(completion)) == approx(value)


def test_repetition_of_other_ngrams():
    assert repetition(answer("a a b"), n=1) == approx(-1 / 3)


@pytest.mark.parametrize("tokens, value", [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (102, -1.1)])
def test_soft_overlong_is_a_ramp_over_the_cache(tokens, value):
    assert soft_overlong(answer(length=tokens), cache=20) == approx(value)


@pytest.mark.parametrize(
    "tokens_per_step, right, wrong",
    [(1, 0.5, 0), (2.5, 0.75, -0.25), (4, 1, -0.5), (2, 0.5 + 0.5 / 4, -0.5 / 4), (0.5, 0.5, 0), (9, 1, -0.5)],
)
def test_speed_pays_fast_right_answers_and_fines_fast_wrong_ones(tokens_per_step, right, wrong):
    assert speed(answer(tokens_per_step=tokens_per_step)) == approx(right)
    assert speed(answer(tokens_per_step=tokens_per_step, verified=False)) == approx(wrong)
    assert speed(answer(tokens_per_step=tokens_per_step, truncated=True)) == approx(wrong)
    assert speed_penalty(answer(tokens_per_step=tokens_per_step)) == 0.5
    assert speed_penalty(answer(tokens_per_step=tokens_per_step, verified=False)) == approx(wrong)


def test_speed_takes_other_ends_and_blocks_of_one():
    assert speed(answer(tokens_per_step=2.5), right=(0, 4)) == approx(2)
    assert speed(answer(tokens_per_step=4, verified=False), wrong=(0, 0)) == 0
    assert speed_penalty(answer(), right=1) == 1
    assert speed(answer(block_size=1)) == 0.5


@pytest.mark.parametrize("tokens, right, wrong", [(0, 0.5, 0), (25, 0.25, 0), (50, 0, 0), (80, -0.3, -0.3)])
def test_length_pays_short_right_answers_and_fines_long_ones(tokens, right, wrong):
    assert length(answer(length=tokens)) == approx(right)
    assert length(answer(length=tokens, verified=False)) == approx(wrong)


def test_length_of_a_truncated_answer_is_minus_a_half():
    assert length(answer(length=103, truncated=True)) == -0.5
