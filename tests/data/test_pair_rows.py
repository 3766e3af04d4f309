"""Rows of pairs, in the layouts that most data sets of preferences have."""

import pytest

from dirl_cli.data.columns import rename_row, summarize_notes
from dirl_cli.data.demonstration_rows import pair
from dirl_cli.data.problem_rows import is_problem
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError

ASK = {"role": "user", "content": "2+2?"}
FOUR, FIVE = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}


def fields_of(**fields) -> tuple[dict, dict]:
    chosen, rejected = pair(Row("pairs.jsonl line 1", fields))
    return chosen.fields, rejected.fields


def test_a_prompt_is_taken_as_written_and_a_question_is_put():
    assert fields_of(prompt="<u>2+2?", chosen="4", rejected="5") == (
        {"prompt": "<u>2+2?", "response": "4"},
        {"prompt": "<u>2+2?", "response": "5"},
    )
    assert fields_of(question="2+2?", chosen=4, rejected="5", system="Be brief.") == (
        {"question": "2+2?", "response": "4", "system": "Be brief."},
        {"question": "2+2?", "response": "5", "system": "Be brief."},
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
        {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]},
        {"prompt": [ASK], "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
        {"prompt": "2+2?", "chosen": [FOUR], "rejected": [FIVE]},
        {"question": "2+2?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
        {"question": "2+2?", "chosen": [FOUR], "rejected": [FIVE]},
        {"question": [ASK], "chosen": "4", "rejected": "5"},
        {"chosen": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "rejected": [ASK, FIVE]},
    ],
)
def test_conversations_that_differ_in_their_last_turn_are_pairs(fields):
    assert fields_of(**fields) == ({"messages": [ASK, FOUR]}, {"messages": [ASK, FIVE]})


def test_a_pair_after_many_turns_is_no_problem():
    assert not is_problem(Row("a", {"prompt": [ASK, FOUR, ASK], "chosen": [FOUR], "rejected": [FIVE]}))
    assert is_problem(Row("a", {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE], "answer": "4"}))


def test_a_system_column_is_the_first_turn_of_both():
    chosen, rejected = fields_of(system="Be brief.", chosen=[ASK, FOUR], rejected=[ASK, FIVE])
    assert chosen["messages"][0] == rejected["messages"][0] == {"role": "system", "content": "Be brief."}


def test_columns_of_another_name_are_mapped_turns_included():
    better, worse = (
        [{"speaker": turn["role"], "text": turn["content"]} for turn in (ASK, one)] for one in (FOUR, FIVE)
    )
    row = Row("a", {"better": better, "worse": worse, "margin": 3})
    mapped = rename_row(row, {"chosen": "better", "rejected": "worse", "role": "speaker", "content": "text"})
    chosen, rejected = pair(mapped)
    assert (chosen.fields, rejected.fields) == ({"messages": [ASK, FOUR]}, {"messages": [ASK, FIVE]})
    assert summarize_notes([chosen]) == ["not read: margin (1 row); a has margin: 3"]


def test_a_question_before_turns_is_the_user_s_turn_and_noted():
    chosen, _ = pair(Row("a", {"question": "2+2?", "chosen": [FOUR], "rejected": [FIVE]}))
    assert summarize_notes([chosen]) == ["1 row: `question` is the first user turn (first a)"]
    spoken = {"speaker": "user", "text": "2+2?"}
    row = Row("a", {"question": [spoken], "chosen": "4", "rejected": "5"})
    chosen, _ = pair(rename_row(row, {"role": "speaker", "content": "text"}))
    assert chosen.fields == {"messages": [ASK, FOUR]}


def test_an_answer_that_is_null_is_empty():
    assert fields_of(question="2+2?", chosen=None, rejected="5")[0] == {"question": "2+2?", "response": ""}


@pytest.mark.parametrize("nothing", [None, "", [], [{"role": "assistant", "content": " "}]])
def test_a_conversation_that_is_answered_by_nothing_has_an_empty_answer(nothing):
    chosen, rejected = fields_of(chosen=[ASK, FOUR], rejected=nothing)
    assert chosen == {"messages": [ASK, FOUR]}
    assert not rejected["messages"][-1]["content"].strip()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"question": "2+2?", "chosen": "4"},
            "line 1 has no rejected: a pair has chosen and rejected, and a prompt or",
        ),
        ({"chosen": "4", "rejected": "5"}, "line 1 has no question: "),
        ({"chosen": [ASK, FOUR], "rejected": [{**ASK, "content": "3+2?"}, FIVE]}, "the same conversation but for its"),
        ({"question": {"a": 1}, "chosen": [FOUR], "rejected": [FIVE]}, "question must be text"),
        ({"chosen": [FOUR], "rejected": [FIVE]}, "line 1 has no turn of the user before chosen and rejected: give a "),
        (
            {"system": "Be brief.", "chosen": [FOUR], "rejected": [FIVE]},
            r"no turn of the user .* with 'data.columns=\{question: …\}'",
        ),
        ({"chosen": [ASK, FOUR, ASK], "rejected": [ASK, FIVE]}, "must each end in the assistant's turn"),
        ({"question": "2+2?", "chosen": {"a": 1}, "rejected": "5"}, "response must be text"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_row(fields, sentence):
    with pytest.raises(DirlError, match=sentence):
        fields_of(**fields)
