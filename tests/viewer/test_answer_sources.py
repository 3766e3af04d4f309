"""Answers of every kind are read as what they are, and what holds none is told."""

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.viewer.answer_sources import read_source
from tests.helpers.shown_answers import FIVE, FOUR, completions_of, evaluation_of, run_of


def test_the_answers_of_a_run_have_their_steps_rewards_and_advantages(tmp_path):
    source = read_source(run_of(tmp_path / "words"), 10)
    assert (source.kind, source.name, source.left_out) == ("rollouts", "words", 0)
    assert [(a.step, a.reward, a.advantage, a.correct, a.length) for a in source.answers] == [
        (1, 1.0, 1.0, True, 1),
        (1, 0.0, -1.0, False, 5),
        (2, 1.0, 1.0, True, 1),
        (2, 0.0, -1.0, False, 5),
    ]
    assert [answer.trajectory for answer in source.answers] == [FOUR, FIVE] * 2


def test_a_step_of_a_run_is_called_after_both(tmp_path):
    source = read_source(run_of(tmp_path / "words") / "rollouts" / "step-000002.jsonl", 10)
    assert source.name == "words step-000002"
    assert {answer.step for answer in source.answers} == {2}


def test_completions_are_graded_by_nobody(tmp_path):
    source = read_source(completions_of(tmp_path / "mine", answers=(FOUR, FIVE)), 10)
    assert (source.kind, source.name) == ("completions", "mine")
    assert [(a.problem.id, a.problem.question, a.correct, a.reward, a.step) for a in source.answers] == [
        ("0", "two plus two?", None, None, None)
    ] * 2
    assert [answer.text for answer in source.answers] == ["four", "five=four\nfive"]


def test_the_answers_of_an_evaluation_have_no_tokens(tmp_path):
    [answer] = read_source(evaluation_of(tmp_path), 10).answers
    assert answer.trajectory is None
    assert (answer.text, answer.correct, answer.reward, answer.extracted, answer.problem.answer) == (
        "four",
        True,
        1.0,
        "four",
        "four",
    )


def test_a_limit_keeps_whole_steps_the_first_the_last_and_between(tmp_path):
    source = read_source(run_of(tmp_path, steps=9), 6)
    assert [answer.step for answer in source.answers] == [1, 1, 5, 5, 9, 9]
    assert source.left_out == 12
    assert {answer.step for answer in read_source(tmp_path, 1).answers} == {9}
    assert len(read_source(tmp_path / "rollouts" / "step-000001.jsonl", 1).answers) == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jsonl", None, "none.jsonl is not there: give what `dirl rl`"),
        ("problems.jsonl", '{"question": "2+2", "answer": "4"}\n', "problems.jsonl holds no answers: give"),
        ("empty.jsonl", "", "empty.jsonl holds no answers: give"),
        ("torn.jsonl", '{"question": ', "torn.jsonl line 1 is not valid JSON: give"),
        ("other", "directory", "other holds no answers: give"),
    ],
)
def test_what_holds_no_answers_is_told(tmp_path, name, content, sentence):
    if content == "directory":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DirlError) as error:
        read_source(tmp_path / name, 10)
    assert sentence in str(error.value)


def test_a_malformed_answer_is_told_with_its_line(tmp_path):
    file = completions_of(tmp_path) / "completions.jsonl"
    file.write_text(file.read_text() * 2 + file.read_text().replace('"reveal_step": [2, 1, 1]', '"reveal_step": [2]'))
    with pytest.raises(DirlError, match=r"completions.jsonl line 3: token_ids, reveal_step and logprobs differ"):
        read_source(tmp_path, 10)
