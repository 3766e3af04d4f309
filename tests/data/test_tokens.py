"""Tokens on the disk: made once for the same rows, template and tokenizer, and made anew for any other."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dirl_cli.data import tokens as module
from dirl_cli.data.chat import encode_demonstrations
from dirl_cli.data.preview import length_table, mark_trained, show_examples
from dirl_cli.data.rows import Row
from dirl_cli.data.tokens import TokenTable, tokens_file, write_tokens
from dirl_cli.errors import DirlError
from dirl_cli.models.tiny import train_tokenizer
from dirl_cli.types import Instruction

ROWS = [Row(f"row {i}", {"prompt": "a b ", "response": "c" * i}) for i in range(1, 6)]
PLAIN = Instruction()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a b c"])


@pytest.fixture
def tokens(tokenizer, tmp_path) -> TokenTable:
    write_tokens(tmp_path / "t.arrow", tokenizer, ROWS, PLAIN)
    return TokenTable.read(tmp_path / "t.arrow")


def test_what_is_read_is_what_was_encoded(tokens, tokenizer):
    encoded = encode_demonstrations(tokenizer, ROWS, PLAIN)
    assert [tokens[i] for i in range(len(tokens))] == encoded
    assert tokens.lengths.tolist() == [len(ids) for ids, _ in encoded]
    assert tokens.answer_tokens == sum(sum(trained) for _, trained in encoded)


def test_those_that_are_too_long_are_left_out_of_all(tokens):
    shorter = tokens.at_most(int(tokens.lengths[1]))
    assert [shorter[0], shorter[1]] == [tokens[0], tokens[1]] and len(shorter) == 2
    assert shorter.lengths.tolist() == tokens.lengths[:2].tolist() and shorter.answer_tokens < tokens.answer_tokens
    assert len(shorter.at_most(0)) == 0 and shorter.at_most(0).answer_tokens == 0


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=5), max_size=5))
def test_tokens_in_memory_are_like_those_on_the_disk(rows):
    encoded = [([i for i, _ in row], [flag for _, flag in row]) for row in rows]
    tokens = TokenTable.of(encoded)
    assert [tokens[i] for i in range(len(tokens))] == encoded
    assert tokens.lengths.tolist() == [len(row) for row in rows]


def test_rows_are_written_a_thousand_at_a_time(tokenizer, tmp_path):
    rows = [Row(f"row {i}", {"prompt": "a", "response": "b" * (i % 7)}) for i in range(2345)]
    write_tokens(tmp_path / "t.arrow", tokenizer, rows, PLAIN)
    tokens = TokenTable.read(tmp_path / "t.arrow")
    assert len(tokens.table["token_ids"].chunks) == 3
    assert [[tokens[i]] for i in (999, 1000, 2344)] == [
        encode_demonstrations(tokenizer, [rows[i]], PLAIN) for i in (999, 1000, 2344)
    ]


def test_the_same_rows_are_kept_in_the_same_place(tokenizer):
    assert tokens_file(tokenizer, ROWS, PLAIN) == tokens_file(train_tokenizer(["a b c"]), list(ROWS), Instruction())


def test_anything_that_changes_the_tokens_changes_the_place(tokenizer, monkeypatch, tmp_path):
    def template(ours: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        ours.chat_template += " "
        return ours

    places = {
        tokens_file(tokenizer, ROWS, PLAIN),
        tokens_file(tokenizer, ROWS[::-1], PLAIN),
        tokens_file(tokenizer, [*ROWS[:-1], Row("row 5", {"prompt": "a b ", "response": "d"})], PLAIN),
        tokens_file(tokenizer, ROWS, Instruction("Box it.")),
        tokens_file(tokenizer, ROWS, Instruction(think=True)),
        tokens_file(train_tokenizer(["hello"] * 9), ROWS, PLAIN),
        tokens_file(template(train_tokenizer(["a b c"])), ROWS, PLAIN),
    }
    monkeypatch.setattr(module, "version", lambda package: "another")
    places.add(tokens_file(tokenizer, ROWS, PLAIN))
    (tmp_path / "chat.py").write_text("another")
    monkeypatch.setattr(module.chat, "__file__", str(tmp_path / "chat.py"))
    places.add(tokens_file(tokenizer, ROWS, PLAIN))
    assert len(places) == 9


def test_the_place_goes_by_the_environment_of_the_datasets_library(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert tokens_file(tokenizer, ROWS, PLAIN).parent == tmp_path / "dirl"
    monkeypatch.delenv("HF_DATASETS_CACHE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "home")
    assert tokens_file(tokenizer, ROWS, PLAIN).parent == Path("home/datasets/dirl")


def test_a_file_that_is_not_finished_is_not_there(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    rows = [*ROWS, Row("f line 6", {"question": "a", "response": "b"})]
    with pytest.raises(DirlError, match=r"^f line 6: .* refuses a conversation"):
        write_tokens(tmp_path / "t.arrow", tokenizer, rows, PLAIN)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DirlError, match=r"cannot be written \(.*\): make room, or name another place with HF_"):
        write_tokens(tmp_path / "file" / "t.arrow", tokenizer, ROWS, PLAIN)


def test_what_is_trained_is_green_and_between_brackets(tokens, tokenizer):
    text = mark_trained(tokenizer, tokens[0])
    assert text.plain == "a b ⟦c<|im_end|>⟧"
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans] == [("⟦c<|im_end|>⟧", "bold green")]


def test_the_table_counts_and_measures(tokenizer):
    table = length_table(
        {"a/long/path.jsonl": TokenTable.of([([1] * n, [False] * (n - 1) + [True]) for n in range(1, 101)])}
    )
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["a/long/path.jsonl", "100", "5,050", "100", "1", "51", "95", "100"]


def test_a_dry_run_shows_two_examples_of_each_source(tokens, tokenizer):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_examples({"one": tokens, "two": TokenTable(tokens.table, np.array([4]))}, tokenizer, console)
    shown = console.export_text()
    assert shown.count("⟦") == 3 and "two, example 1: " in shown and "⟦ccccc<|im_end|>⟧" in shown
