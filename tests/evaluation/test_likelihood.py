"""Bits per token of texts: what is summed, told and kept on the disk."""

import csv
import json
import re
from math import log, sqrt
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dirl_cli.commands import eval as command
from dirl_cli.commands import eval_likelihood
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.likelihood import TextLikelihood, measure_texts, read_texts
from dirl_cli.files import conf_dir
from dirl_cli.models.tiny import Tiny
from dirl_cli.training.text_likelihood import Text, left_to_right, windows
from tests.helpers.small import small_lm

BIT = log(2)
A = TextLikelihood("text-0", 2, 10, -4 * BIT, [-6 * BIT, -8 * BIT], [-3 * BIT, 0.0], [2, 0])
B = TextLikelihood("text-1", 6, 30, -12 * BIT, [-10 * BIT, -10 * BIT], [-5 * BIT, 0.0], [2, 0])


def test_bits_are_per_token_and_per_byte_of_all_texts():
    metrics = measure_texts([A, B])
    assert (metrics.left_to_right, metrics.left_to_right_per_byte) == pytest.approx((16 / 8, 16 / 40))
    assert (metrics.elbo, metrics.elbo_per_byte) == pytest.approx((17 / 8, 17 / 40))
    assert metrics.elbo_standard_error == pytest.approx(sqrt(2 / 2) / 8)  # A's draws have the variance 2, B's none
    low, high = metrics.by_rate
    assert (low.up_to, low.tokens, low.bits_per_token) == (0.5, 4, pytest.approx(2))
    assert high.bits_per_token is None


def test_of_one_draw_no_standard_error_is_told():
    assert measure_texts([TextLikelihood("text-0", 1, 1, -1.0, [-1.0], [-1.0], [1])]).elbo_standard_error is None


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "text-0", "tokens": 2}\n')
    with pytest.raises(DirlError, match="line 1 is not a text's likelihood: remove it"):
        read_texts(tmp_path / "texts.jsonl")


def test_every_token_of_a_long_text_is_scored_once_behind_some_context():
    text = Text(list(range(23)), [True] * 23)
    pieces = windows(text, 8, 4)
    scored = [token for piece in pieces for token, flag in zip(piece.token_ids, piece.scored, strict=True) if flag]
    assert scored == list(range(23))
    assert [len(piece.token_ids) for piece in pieces] == [8, 8, 8, 8, 8]
    assert all(piece.scored.index(True) >= 4 for piece in pieces[1:])
    assert windows(text, 23, 4) == [text]


@pytest.fixture
def config(here):
    """The config of the command on a small model and a file of two answers and a text."""
    rows = [{"question": "Tom has 7 pens.", "response": "7"}, {"prompt": "How many?", "response": "Tom has 12 pens."}]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        small = ["+model.hidden_size=32", "+model.num_hidden_layers=1", "+model.intermediate_size=32"]
        small.append("+model.max_position_embeddings=256")
        cfg = compose("eval", ["bench=likelihood", "data=file", "data.path=rows.jsonl", "bench.draws=3", *small])
    (here / "out").mkdir()
    return cfg


def test_the_command_leaves_a_card_a_csv_and_a_line_for_each_text(config, here, capsys):
    command.run(config, here / "out")
    card = json.loads((here / "out" / "eval_card.json").read_text())
    texts = read_texts(here / "out" / "texts.jsonl")
    assert [text.text for text in texts] == ["text-0", "text-1"]
    assert card["likelihood"]["left_to_right"] == pytest.approx(measure_texts(texts).left_to_right)
    [line] = csv.DictReader((here / "out" / "likelihood.csv").open())
    assert float(line["bits_per_token_elbo"]) == card["likelihood"]["elbo"]
    assert card["record"]["hardware"]["processes"] == 1 and card["attention"] == config.attention
    shown = capsys.readouterr().out
    assert re.search(r"left to right +\d+ +\d+\.\d{4}", shown) and re.search(r"masked 75-100 % +\d+ +\d+\.\d{4}", shown)

    # The answer and what ends its turn, and nothing of the question.
    assert texts[1].bytes == len("Tom has 12 pens.")


def test_what_is_scored_already_is_not_scored_again_and_the_rest_is_the_same(config, here, monkeypatch):
    command.run(config, here / "out")
    whole = read_texts(here / "out" / "texts.jsonl")
    (here / "again").mkdir()
    for file in ("texts.jsonl", "sampled_from.json"):
        (here / "again" / file).write_text((here / "out" / file).read_text())
    lines = (here / "again" / "texts.jsonl").read_text().splitlines()
    (here / "again" / "texts.jsonl").write_text(lines[0] + "\n" + lines[1][:20])  # torn

    scored = []
    real = eval_likelihood.score_texts

    def noted(lm, names, *rest):
        scored.extend(names)
        return real(lm, names, *rest)

    monkeypatch.setattr(eval_likelihood, "score_texts", noted)
    command.run(config, here / "again")
    assert scored == ["text-1"]
    again = read_texts(here / "again" / "texts.jsonl")
    assert again[1].elbo == pytest.approx(whole[1].elbo, abs=1e-4)


def test_plain_text_is_scored_from_its_first_token(config, here):
    (here / "plain.jsonl").write_text('{"text": "Tom has 7 pens."}\n')
    config.data.path = "plain.jsonl"
    config.bench.column = "text"
    command.run(config, here / "out")
    [text] = read_texts(here / "out" / "texts.jsonl")
    lm = Tiny(hidden_size=32, num_hidden_layers=1, intermediate_size=32, max_position_embeddings=256).load(
        "float32", "cpu"
    )
    ids = lm.tokenizer("Tom has 7 pens.")["input_ids"]
    [slow] = left_to_right(lm, [Text(ids, [True] * len(ids))], 64)
    assert text.tokens == len(ids) and text.left_to_right == pytest.approx(slow.total, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"predictions": "answers.jsonl"}, "predictions is of problems"),
        ({"bench": {"column": "body"}}, r"rows.jsonl line 1 has no body: bench.column=body is what is scored"),
        ({"model": {"max_position_embeddings": 8}}, "no text is left to score: give other data="),
    ],
)
def test_what_cannot_be_scored_is_told_in_a_sentence(config, here, change, sentence):
    with pytest.raises(DirlError, match=sentence):
        command.run(OmegaConf.merge(config, change), here / "out")


def test_a_sweep_ends_in_one_table_and_one_file(config, here, capsys):
    for name in ("a", "b"):
        command.run(config, here / name)
    command.after_sweep("seed=0,1", [(["seed=0"], here / "a"), (["seed=1"], here / "b")])
    lines = list(csv.DictReader((here / "seed=0,1.csv").open()))
    assert [line["run"] for line in lines] == ["seed=0", "seed=1"]
    assert lines[0]["bits_per_token_elbo"] == lines[1]["bits_per_token_elbo"]


def test_what_any_source_of_a_mixture_holds_out_is_all_that_is_scored(monkeypatch):
    def source(held_out, rest):
        return SimpleNamespace(name="s", validation=lambda: held_out, demonstrations=lambda: rest)

    monkeypatch.setattr(eval_likelihood, "sources_of", lambda data: (data, [1.0] * len(data)))
    assert eval_likelihood.text_rows([source(["a"], ["b"]), source([], ["c"])], None) == ["a"]
    assert eval_likelihood.text_rows([source([], ["b"]), source([], ["c"])], None) == ["b", "c"]


def test_of_a_model_that_looks_back_the_very_first_token_is_given():
    assert eval_likelihood.without_first_of_shifted(SimpleNamespace(logit_shift=True), [True, True]) == [False, True]
    assert eval_likelihood.without_first_of_shifted(small_lm(), [True, True]) == [True, True]
