"""`dirl generate`: prompts in every form, answers on disk as they finish, and a run that goes on where it stopped."""

import io
import json
import math
import os
import re
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from dirl_cli.cli import schema
from dirl_cli.commands import generate
from dirl_cli.commands.block_screen import HIDDEN, Screen
from dirl_cli.console import PlainConsole
from dirl_cli.errors import DirlError, Stopped
from dirl_cli.files import conf_dir
from dirl_cli.models.load import SavedModel
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.sft.answer_credits import grade
from dirl_cli.sft.sampled_answers import SampledAnswers
from dirl_cli.text import escape_controls
from dirl_cli.training.logprobs import trajectory_logprobs
from dirl_cli.types import Decoding, Trajectory
from tests.helpers.rl_runs import save_sharp_model
from tests.helpers.small import MASK, small_lm

OURS = (
    "index",
    "sample",
    "text",
    "prompt_ids",
    "token_ids",
    "reveal_step",
    "logprobs",
    "stop_reason",
    "forwards",
    "stop_token_ids",
    "block_size",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sharp_model(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A model without a tokenizer."""
    directory = tmp_path_factory.mktemp("bare") / "model"
    small_lm().save(directory)
    return directory


def dirl_generate(model: Path, out: Path, **options) -> list[dict]:
    """Run the command; the lines it wrote."""
    schema.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("generate", ["~experiment", "model=path", f"model.path={model}", "device=cpu"])
    OmegaConf.update(cfg, "decoding", {"max_new_tokens": 8, "temperature": 1.0})
    for key, value in options.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    OmegaConf.resolve(cfg)
    generate.run(cfg, out)
    return read(out)


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "completions.jsonl").read_text().split("\n")[:-1]]


def file(directory: Path, *rows: dict | str) -> str:
    path = directory / "input.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def by_place(lines: list[dict]) -> dict[tuple[int, int], dict]:
    return {(line["index"], line["sample"]): line for line in lines}


def test_a_prompt_becomes_a_user_turn_and_its_answer_is_shown_and_written(model, tmp_path, capsys):
    [line] = dirl_generate(model, tmp_path, prompt="What is 2+3?")
    assert set(OURS) <= line.keys() and line["prompt"] == "What is 2+3?"
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(line["prompt_ids"]) == "<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n"
    assert len(line["token_ids"]) == len(line["reveal_step"]) == len(line["logprobs"])
    shown = capsys.readouterr().out
    assert escape_controls(line["text"]) in shown
    assert f"{len(line['token_ids'])} tokens in {line['forwards']} forwards" in shown
    assert f"1 completion in {tmp_path}/completions.jsonl" in shown


@pytest.mark.parametrize("decoding", sorted(path.stem for path in (conf_dir() / "decoding").iterdir()))
def test_what_is_written_scores_as_it_was_sampled(decoding, model, tmp_path):
    settings = OmegaConf.load(conf_dir() / f"decoding/{decoding}.yaml")
    options = {f"decoding__{key}": value for key, value in settings.items()}
    lines = dirl_generate(model, tmp_path, prompt="hi", samples=3, **options)
    names = ("prompt_ids", "token_ids", "reveal_step", "logprobs", "stop_reason")
    trajectories = [Trajectory(**{name: line[name] for name in names}) for line in lines]
    lm = SavedModel("", str(model)).load("float32", "cpu")
    assert {(line["block_size"], *line["stop_token_ids"]) for line in lines} == {(4, *lm.stop_token_ids)}
    # And fine-tuning learns from it in the order in which it was revealed.
    table = SampledAnswers(str(tmp_path), least_reward=-math.inf).tables(lm, grade, 1000).training
    for i, answer in enumerate(trajectories):
        assert table.revealed_at(i) == [0] * len(answer.prompt_ids) + answer.revealed_at(4)
        assert max(table.revealed_at(i)) == lines[i]["denoise_forwards"]
    for line, scored in zip(lines, trajectory_logprobs(lm, trajectories, Decoding(temperature=1.0)), strict=True):
        assert line["logprobs"] == pytest.approx(scored, abs=1e-5)


def test_messages_are_a_conversation(model, tmp_path):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    [line] = dirl_generate(model, tmp_path, messages=messages)
    text = AutoTokenizer.from_pretrained(model).decode(line["prompt_ids"])
    assert text.endswith("b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")


def stdin(monkeypatch, given: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))


def test_a_prompt_and_a_conversation_come_through_a_pipe(model, tmp_path, monkeypatch, capsys):
    for options in ({}, {"prompt": "-"}):
        stdin(monkeypatch, "$5, é?\n2.\n".encode())
        [line] = dirl_generate(model, tmp_path, **options)
        assert line["prompt"] == "$5, é?\n2."
        assert "prompt: $5, é?\n2.\n" in capsys.readouterr().out
    turns = [{"role": "user", "content": "π, 7"}]
    (tmp_path / "chat.json").write_text(json.dumps(turns))
    stdin(monkeypatch, json.dumps(turns).encode())
    for messages in (str(tmp_path / "chat.json"), "-", "[{role: user, content: 'π, 7'}]", json.dumps(turns)):
        [line] = dirl_generate(model, tmp_path, messages=messages)
        assert line["messages"] == turns
    stdin(monkeypatch, b"\xff")
    with pytest.raises(DirlError, match=r"standard input is not UTF-8 text \(byte 0\)"):
        dirl_generate(model, tmp_path, prompt="-")


def test_random_weights_are_told(tmp_path, capsys):
    schema.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("generate", ["prompt=a", "device=cpu", "decoding.max_new_tokens=4"])
    generate.run(cfg, tmp_path)
    assert "tiny has random weights" in capsys.readouterr().out


def test_a_file_holds_prompts_of_every_form_and_keeps_what_else_it_says(model, tmp_path):
    rows = file(
        tmp_path,
        {"question": "1+1?", "id": "first", "index": 7, "text": "mine"},
        {"prompt": "1+1?"},
        {"messages": [{"role": "user", "content": "1+1?"}]},
        {"prompt_ids": [5, 6]},
    )
    lines = by_place(dirl_generate(model, tmp_path / "out", input=rows, samples=2))
    assert lines.keys() == {(i, s) for i in range(4) for s in range(2)}
    assert lines[0, 0]["id"] == "first" and lines[0, 0]["text"] != "mine"
    assert lines[0, 0]["prompt_ids"] == lines[1, 0]["prompt_ids"] == lines[2, 0]["prompt_ids"]
    assert lines[0, 0]["token_ids"] == lines[1, 0]["token_ids"] != lines[0, 1]["token_ids"]
    assert lines[3, 0]["prompt_ids"] == [5, 6]


def test_the_instruction_is_asked_after_each_question_but_no_other_prompt(model, tmp_path):
    rows = file(tmp_path, {"question": "1+1?"}, {"prompt": "1+1?"})
    question, prompt = (
        lines[key]["prompt_ids"]
        for lines in [by_place(dirl_generate(model, tmp_path / "out", input=rows, instruction__text="Box it."))]
        for key in ((0, 0), (1, 0))
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert "1+1?\nBox it.<|im_end|>" in tokenizer.decode(question)
    assert "1+1?<|im_end|>" in tokenizer.decode(prompt)


def test_every_line_may_have_a_seed_of_its_own(model, tmp_path):
    rows = file(tmp_path, {"question": "a", "seed": 5}, {"question": "a"}, {"question": "a", "seed": 5})
    five, zero, again = (
        line["token_ids"] for _, line in sorted(by_place(dirl_generate(model, tmp_path / "out", input=rows)).items())
    )
    assert five == again != zero
    [seeded] = dirl_generate(model, tmp_path / "seeded", prompt="a", decoding__seed=5)
    assert seeded["token_ids"] == five


def test_a_model_without_a_tokenizer_takes_token_ids_and_nothing_else(bare, tmp_path):
    rows = file(tmp_path, {"prompt_ids": [5, 6, 7]}, {"prompt_ids": []})
    lines = by_place(dirl_generate(bare, tmp_path / "out", input=rows))
    assert lines[0, 0]["text"] is None and len(lines[0, 0]["token_ids"]) == 9 and len(lines[1, 0]["token_ids"]) == 8
    with pytest.raises(DirlError, match="has no tokenizer"):
        dirl_generate(bare, tmp_path / "text", prompt="hi")
    with pytest.raises(DirlError, match="has no tokenizer"):
        dirl_generate(bare, tmp_path / "out", input=rows, watch=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "nothing came on standard input: give prompt=TEXT, messages=FILE or input=FILE.jsonl"),
        ({"messages": "{role: user}"}, "messages must be a list of objects with role and content"),
        ({"messages": "none.json"}, "messages=none.json cannot be read"),
        ({"messages": "[{role: user"}, "messages is not a list that can be read"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "give one of prompt=TEXT"),
        ({"prompt": "a", "rollout__max_batch": 0}, "rollout.max_batch=0: give a whole number of at least 1"),
        ({"prompt": "a", "decoding__block_size": 8}, "block_size is 8 and the model's is 4"),
        ({"prompt": "a", "decoding__strategy": "sequental"}, "did you mean sequential"),
        ({"prompt": "a " * 2000}, r"the prompt of the command line has \d+ tokens and the model has room for 1023"),
        ({"messages": [{"role": "user"}]}, "the command line turn 1: messages must be a list of objects with role and"),
        ({"messages": []}, "messages must be a list of objects"),
        ({"input": "none.jsonl"}, "none.jsonl does not exist: check the path"),
    ],
)
def test_what_a_user_can_fix_is_told_in_a_sentence(model, tmp_path, monkeypatch, options, sentence):
    stdin(monkeypatch, b"")
    with pytest.raises(DirlError, match=sentence):
        dirl_generate(model, tmp_path, **options)
    assert not (tmp_path / "completions.jsonl").exists() or not read(tmp_path)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{bad", "is not valid JSON"),
        ("[5]", "is not a JSON object"),
        ({"answer": "4"}, "has no prompt: give question, prompt, messages or prompt_ids"),
        ({"prompt": ["a"]}, "prompt must be text"),
        ({"question": None}, "question must be text"),
        ({"messages": "hi"}, "messages must be a list of objects with role and content, both text"),
        ({"messages": [{"content": "a"}]}, "messages must be a list of objects with role and content, both text"),
        ({"prompt_ids": [5, 999]}, "prompt_ids must be a list of token ids below 373"),
        ({"prompt_ids": [True]}, "prompt_ids must be a list of token ids below 373"),
        ({"prompt_ids": [5] * 1024}, "has 1024 tokens and the model has room for 1023: shorten it or leave it out"),
        ({"question": "a", "seed": "b"}, "seed must be a whole number, not b"),
    ],
)
def test_a_malformed_line_is_named_before_anything_is_sampled(model, tmp_path, row, sentence):
    with pytest.raises(DirlError, match=rf"input.jsonl line 2.*{sentence}"):
        dirl_generate(model, tmp_path / "out", input=file(tmp_path, {"question": "a"}, row))
    assert not (tmp_path / "out").exists()


# What is on disk


def test_an_earlier_file_is_kept_beside(model, tmp_path):
    kept = []
    for prompt in ("a", "b", "c", "d"):
        kept.append(dirl_generate(model, tmp_path, prompt=prompt))
        if prompt == "c":
            (tmp_path / "completions~1.jsonl").unlink()  # its number is free again, the others stay
    assert read(tmp_path) == kept[3]
    for number, prompt in ((1, "c"), (2, "b")):
        [line] = map(json.loads, (tmp_path / f"completions~{number}.jsonl").read_text().splitlines())
        assert line["prompt"] == prompt


ROWS = [{"question": f"{i}+1?"} for i in range(6)]


def interrupt(monkeypatch, after: int) -> None:
    """Let the sampler fail once it has finished so many answers."""
    whole = NativeSampler.stream

    def stream(self, *args, **kwargs):
        yield from islice(whole(self, *args, **kwargs), after)
        raise KeyboardInterrupt

    monkeypatch.setattr(NativeSampler, "stream", stream)


def test_an_interrupted_file_goes_on_where_it_stopped(model, tmp_path, monkeypatch, capsys):
    options = {"input": file(tmp_path, *ROWS), "samples": 2, "rollout__max_batch": 3}
    whole = by_place(dirl_generate(model, tmp_path / "whole", **options))
    sentence = f"stopped: 5 of 12 completions are in {tmp_path}/out/completions.jsonl, and the same command goes on"
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=sentence) as stopped:
        interrupt(patch, after=5)
        dirl_generate(model, tmp_path / "out", **options)
    assert stopped.value.exit_code == 130
    written = read(tmp_path / "out")
    assert len(written) == 5
    with (tmp_path / "out/completions.jsonl").open("a") as torn:
        torn.write('{"index": 5, "sam')
    lines = dirl_generate(model, tmp_path / "out", **options)
    assert f"5 of 12 completions are in {tmp_path}/out/completions.jsonl" in capsys.readouterr().out
    assert lines[:5] == written and len(lines) == 12
    assert {key: line["token_ids"] for key, line in by_place(lines).items()} == {
        key: line["token_ids"] for key, line in whole.items()
    }
    assert dirl_generate(model, tmp_path / "out", **options) == lines
    assert not (tmp_path / "out/completions~1.jsonl").exists()


def test_a_run_that_was_interrupted_before_its_first_answer_leaves_nothing_aside(model, tmp_path, monkeypatch):
    options = {"input": file(tmp_path, *ROWS)}
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="0 of 6"):
        interrupt(patch, after=0)
        dirl_generate(model, tmp_path / "out", **options)
    assert len(dirl_generate(model, tmp_path / "out", **options)) == 6
    assert not (tmp_path / "out/completions~1.jsonl").exists()


@pytest.mark.parametrize(
    "change", [{"decoding__seed": 1}, {"samples": 2}, {"instruction__text": "Box it."}, {"rows": ROWS[:5]}]
)
def test_another_request_begins_anew_and_keeps_what_there_was(model, tmp_path, change):
    options = {"input": file(tmp_path, *ROWS)}
    before = dirl_generate(model, tmp_path / "out", **options)
    file(tmp_path, *change.get("rows", ROWS))
    changed = {key: value for key, value in change.items() if key != "rows"}
    dirl_generate(model, tmp_path / "out", **options, **changed)
    assert [json.loads(line) for line in (tmp_path / "out/completions~1.jsonl").read_text().splitlines()] == before


def test_other_weights_in_the_same_place_begin_anew(tmp_path):
    options = {"input": file(tmp_path, {"prompt_ids": [5, 6]}), "model": tmp_path / "model", "out": tmp_path / "out"}
    for seed in (0, 1):
        small_lm(seed=seed).save(tmp_path / "model")
        dirl_generate(**options)
    assert (tmp_path / "out/completions~1.jsonl").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_is_told_in_one_sentence(bare, tmp_path):
    options = {"input": file(tmp_path, {"prompt_ids": [5, 6]})}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/completions.jsonl").symlink_to("/dev/full")
    with pytest.raises(DirlError, match=r"completions.jsonl cannot be written \(No space left on device\): make room"):
        dirl_generate(bare, tmp_path / "out", **options)


def test_a_directory_that_cannot_be_is_told_in_one_sentence(bare, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DirlError, match=r"cannot be written \(Not a directory\)"):
        dirl_generate(bare, tmp_path / "file/out", input=file(tmp_path, {"prompt_ids": [5]}))


# What is shown


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    screen = io.StringIO()
    fake = partial(PlainConsole, file=screen, force_terminal=True, width=100, color_system="truecolor")
    monkeypatch.setattr(generate, "PlainConsole", fake)
    return screen


def test_the_blocks_are_watched_filling(model, tmp_path, terminal):
    lines = dirl_generate(model, tmp_path, prompt="hi", samples=8, watch=True, pace=0.0, decoding__max_new_tokens=16)
    shown = terminal.getvalue()
    assert HIDDEN in shown and "0.0" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert all(f"{len(line['token_ids'])} tokens in" in plain for line in lines)
    assert len(lines) == 8


def test_what_a_forward_revealed_is_lit(model):
    lm = SavedModel("", str(model)).load("float32", "cpu")
    mask = lm.mask_token_id
    screen = Screen(PlainConsole(file=io.StringIO()), lm, pace=0.0)
    screen.show(0, 0, [20, mask])
    screen.show(0, 0, [20, 21])
    picture = screen.picture((0, 0))
    assert picture.plain == lm.tokenizer.decode([20]) + lm.tokenizer.decode([21])
    assert [str(span.style) for span in picture.spans if span.style] == ["bold green"]
    screen.show(0, 0, [20, 21, mask, mask])
    assert screen.picture((0, 0)).plain.endswith(HIDDEN * 4)
    screen.finish(0, 0)
    assert not screen.answers


def test_odd_characters_in_paths_and_answers_are_shown_as_they_are(model, tmp_path, capsys):
    out = tmp_path / "[bold]x[/bold]"
    dirl_generate(model, out, prompt="[red]hi[/red]")
    assert f"1 completion in {out}/completions.jsonl" in capsys.readouterr().out


def test_the_mask_token_is_never_written(bare, tmp_path):
    lines = dirl_generate(bare, tmp_path / "out", input=file(tmp_path, {"prompt_ids": [5]}), samples=20)
    assert all(MASK not in line["token_ids"] for line in lines)
