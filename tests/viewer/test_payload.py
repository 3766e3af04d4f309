"""The payload holds each text once, what revealed each token, and nothing that nobody told."""

from pathlib import Path

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.types import Trajectory
from dirl_cli.viewer.answer_sources import read_source
from dirl_cli.viewer.payload import TokenReader, payload
from tests.helpers.shown_answers import Words, completions_of, evaluation_of, run_of


def payload_of(*paths: Path) -> dict:
    sources = [read_source(path, 100) for path in paths]
    return payload(sources, [TokenReader(Words()) for _ in sources], "dirl view it")


def test_an_answer_is_places_in_the_texts_and_what_revealed_each(tmp_path):
    data = payload_of(run_of(tmp_path))
    answer = data["answers"][1]
    assert [data["texts"][place] for place in answer["tokens"]] == ["five", "=", "four", "\n", "five", "<end>", "<end>"]
    assert answer["steps"] == [1, 1, 2, 1, 1, 2, 2]
    # Its prompt of five tokens leaves three places in the first block; the second block begins at forward 3.
    assert (answer["offset"], answer["block_size"]) == (1, 4)
    assert answer["order"] == [1, 1, 2, 3, 3, 4, 4]
    assert answer["logprobs"] == [-0.6931] * 7
    assert data["prompts"] == ["two" * 5]


def test_answers_to_a_problem_in_a_step_are_a_group_and_other_steps_the_same_problem(tmp_path):
    answers = payload_of(run_of(tmp_path))["answers"]
    assert [(answer["problem"], answer["group"]) for answer in answers] == [(0, 0), (0, 0), (0, 1), (0, 1)]


def test_two_sources_share_the_problems_that_are_the_same(tmp_path):
    data = payload_of(completions_of(tmp_path / "a"), completions_of(tmp_path / "b"), evaluation_of(tmp_path / "c"))
    assert [(answer["source"], answer["problem"]) for answer in data["answers"]] == [(0, 0), (1, 0), (2, 1)]
    assert [source["summary"] for source in data["sources"]] == [
        "1 answer to 1 problem sampled by dirl generate",
        "1 answer to 1 problem sampled by dirl generate",
        "1 answer to 1 problem of an evaluation",
    ]


def test_what_nobody_told_is_left_out(tmp_path):
    [completion] = payload_of(completions_of(tmp_path / "a"))["answers"]
    assert not {"correct", "reward", "advantage", "step", "text", "parts"} & completion.keys()
    [evaluated] = payload_of(evaluation_of(tmp_path / "b"))["answers"]
    assert not {"tokens", "steps", "prompt", "advantage"} & evaluated.keys()
    assert (evaluated["text"], evaluated["reward"]) == ("four", 1.0)


def test_a_letter_of_two_tokens_is_at_the_first_and_a_token_without_text_is_its_number():
    reader = TokenReader(Words())
    assert reader.pieces([1, 7, 8, 2]) == ["two", "€", "", " plus"]
    assert reader.pieces([7, 1, 99]) == ["\ufffd", "two", "⟨99⟩"]
    assert TokenReader(None).pieces([3, 4]) == ["⟨3⟩", "⟨4⟩"]


def test_blocks_of_which_nothing_tells_the_size_are_an_error():
    nameless = Trajectory([1], [1], [1], [0.0])
    assert TokenReader(None, 8).block_size_of(nameless) == 8
    with pytest.raises(DirlError, match="give the model with model=DIR"):
        TokenReader(None).block_size_of(nameless)
