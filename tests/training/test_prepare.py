"""From files to what a run learns from: what is left out and why, tokens made once, several sources, a dry run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli import schema
from dirl_cli.commands import rl, sft
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.tiny import Tiny
from dirl_cli.report.progress import StepProgress
from dirl_cli.training.prepare import Questions, Reader
from dirl_cli.types import Instruction, Problem
from tests.helpers.small import paid_by_the_letter, published_vocabulary

SMALL = ("+model.hidden_size=32", "+model.num_hidden_layers=1", "+model.intermediate_size=32")
SHORT = ("steps=2", "device=cpu", "eval_problems=2", "decoding.max_new_tokens=4", "log_every=1")


def config(command: str, *words: str) -> DictConfig:
    schema.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(command, ["model=tiny", *SMALL, *SHORT, *words])
    OmegaConf.resolve(cfg)
    return cfg


def save(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def lm() -> DiffusionLM:
    return Tiny(max_position_embeddings=64).load("float32", "meta", "sdpa")


def reader_for(lm: DiffusionLM, **limits) -> Reader:
    return Reader(lm, Instruction(), Accelerator(cpu=True), StepProgress(1, 1, ()), **limits)


def said(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_demonstrations_are_tokenised_once_and_counted(lm, capsys):
    reader = reader_for(lm, max_tokens=40)
    rows = [{"prompt": "1+1?", "response": f"{'2' * n}"} for n in (1, 20, 60, 80)] + [
        {"prompt": "1+1?", "response": " \n"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]},
    ]
    rows = [Row("row", row) for row in rows]
    first, again = reader.demonstrations("rows", rows), reader.demonstrations("rows", rows)
    assert [first[i] for i in range(len(first))] == [again[i] for i in range(len(again))] and len(first) == 2
    counted = "2 rows, {} tokens{}; 2 left out that answer nothing; 2 left out that are longer than max_tokens=40"
    warning = "warning: 67% of 6 rows are not learned from; the longest has 85 tokens"
    assert said(capsys) == [
        counted.format(first.lengths.sum(), ""), warning,
        counted.format(first.lengths.sum(), ", tokenised before"), warning,
    ]  # fmt: skip


def test_what_is_longer_than_the_model_is_told_apart(lm, capsys):
    reader_for(lm, max_tokens=1000).demonstrations(
        "rows", [Row("row", {"prompt": "?", "response": "2" * n}) for n in (20, 100)]
    )
    assert said(capsys)[0].endswith("; 1 left out that are longer than the model's 64 positions")


def test_an_end_at_which_sampling_does_not_stop_is_told(lm, capsys):
    rows = [Row("row", {"prompt": "?", "response": "2"})]
    reader_for(replace(lm, stop_token_ids=(0,)), max_tokens=40).demonstrations("rows", rows)
    assert said(capsys)[0].startswith(
        "warning: answers are learned to end in <|im_end|>, at which sampling does not stop"
    )


def test_nothing_is_said_of_no_rows(lm, capsys):
    reader = reader_for(lm)
    assert len(reader.demonstrations("rows", [])) == len(reader.problems("problems", []).problems) == 0
    assert said(capsys) == []


def test_problems_without_an_answer_or_with_a_long_prompt_are_left_out(lm, capsys):
    problems = [Problem("a", "1+1?", "2"), Problem("b", "1+1?", " "), Problem("c", "1" * 40, "2")]
    found = reader_for(lm, max_prompt_tokens=20).problems("problems", problems)
    assert ([one.id for one in found.problems], len(found.prompts)) == (["a"], 1)
    left_out = "1 left out that have no answer; 1 left out that have prompts longer than"
    warning = "warning: 67% of 3 rows are not learned from; the longest has 48 tokens"
    assert said(capsys) == [f"1 problems; {left_out} rl.max_prompt_tokens=20", warning]
    roomy = reader_for(lm)
    assert [one.id for one in roomy.problems("problems", problems).problems] == ["a", "c"]
    assert roomy.problems("problems", [Problem("d", "1" * 60, "2")]).problems == []
    assert said(capsys)[2].endswith("longer than the 63 tokens there is room for")


@pytest.fixture
def sources(tmp_path) -> list[str]:
    """A mix of demonstrations as written, and of questions with responses under other names."""
    ours = [{"prompt": f"{i}+1?", "response": str(i + 1)} for i in range(6)]
    theirs = [{"problem": f"{i}+2?", "solution": str(i + 2), "answer": i + 2} for i in range(5)]
    columns = "{question: problem, response: solution, ground_truth_answer: answer}"
    first, second = save(tmp_path / "a.jsonl", ours), save(tmp_path / "b.jsonl", theirs)
    parts = f"[{{path: {first}, weight: 3}}, {{path: {second}, name: b, weight: 1, held_out: 2, columns: {columns}}}]"
    return ["data=mix", f"data.sources={parts}"]


def test_the_digest_of_problems_changes_with_how_they_are_verified():
    def digest(problem: Problem) -> str:
        return Questions([problem], [[1, 2]]).digest

    plain = Problem("1", "?", "4")
    puzzle = replace(plain, verifier="countdown", details={"numbers": [1, 3], "target": 4})
    other = replace(puzzle, details={"numbers": [2, 2], "target": 4})
    assert len({digest(plain), digest(puzzle), digest(other)}) == 3
    assert digest(replace(plain, id="2")) == digest(plain)


def test_a_mix_is_learned_from_by_weight_with_epochs_of_each(sources, tmp_path, capsys):
    sft.run(config("sft", *sources, "batch_size=4"), tmp_path / "out")
    shown = said(capsys)
    assert shown[0].startswith(f"6 training demonstrations of {tmp_path}/a.jsonl, ")
    assert [line.partition(", ")[0] for line in shown[1:4]] == [
        "3 training demonstrations of b", "2 held-out demonstrations of b", "2 held-out problems",
    ]  # fmt: skip
    last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert (last[f"epoch/{tmp_path}/a.jsonl"], last["epoch/b"]) == (6 / 6, 2 / 3)
    assert "validation_loss" in last and "greedy_accuracy" in last


def test_a_dry_run_shows_what_is_trained_and_writes_nothing(sources, tmp_path, capsys):
    sft.run(config("sft", *sources, "batch_size=4", "dry_run=true"), tmp_path / "out")
    shown = said(capsys)
    assert "0+1?⟦1<|im_end|>⟧" in shown and "⟦2<|im_end|>⟧" in shown
    at = next(i for i, line in enumerate(shown) if line.startswith("b, example 1: "))
    boxed = r"Please reason step by step, and put your final answer within $\boxed{}$.<|im_end|>"
    assert shown[at + 1 : at + 4] == ["<|im_start|>user", "0+2?", boxed]
    assert f"after 2 steps: epoch/{tmp_path}/a.jsonl 1.00 · epoch/b 0.67" in shown
    assert any(line.split()[:4] == ["tokens", "examples", "in", "all"] and "trained" in line for line in shown)
    assert not (tmp_path / "out").exists()


RL = ("rl.problems=2", "rl.group_size=2", "rl.filter=none", "rl.max_rounds=1", "eval_problems=0")


@pytest.mark.parametrize(
    ("command", "run", "more"),
    [("sft", sft.run, ["batch_size=2"]), pytest.param("rl", rl.run, RL, marks=pytest.mark.slow)],
)
def test_an_unfinished_run_does_not_go_on_with_other_rows(tmp_path, command, run, more):
    rows = [{"question": f"{i}+1?", "response": str(i), "ground_truth_answer": i} for i in range(6)]
    words = ["data=file", f"data.path={save(tmp_path / 'a.jsonl', rows)}", "data.name=mine", "save_every=1", *more]
    words += [paid_by_the_letter(tmp_path)] if command == "rl" else []
    out = tmp_path / "out"
    run(config(command, *words), out)
    for written in ("model", "checkpoints/step-000002"):
        shutil.rmtree(out / written)

    save(tmp_path / "a.jsonl", rows[::-1])
    with pytest.raises(DirlError, match=r"the rows of mine are not those that this run began with: put them back, "):
        run(config(command, *words), out)
    run(config(command, *words, f"resume={out}/checkpoints/step-000001"), tmp_path / "another")

    save(tmp_path / "a.jsonl", rows)
    run(config(command, *words), out)
    assert (out / "model").is_dir()


def test_a_dry_run_shows_the_reference_answers_beside_the_prompts(tmp_path, capsys):
    data = save(tmp_path / "a.jsonl", [{"question": "2+2?", "answer": "2+2=4\n#### 4", "hint": "count"}])
    rl.run(config("rl", "data=file", f"data.path={data}", "dry_run=true"), tmp_path / "out")
    shown = said(capsys)
    assert shown[1:3] == [
        f"  1 row: `answer` is the reference answer (first {data} line 1)",
        f'  not read: hint (1 row); {data} line 1 has hint: "count"',
    ]
    at = shown.index("reference answer: 4")
    assert shown[at - 2 : at] == ["<|im_start|>assistant", ""]
    [header] = [line.split() for line in shown if line.startswith("tokens ")]
    assert header[:5] == ["tokens", "examples", "in", "all", "shortest"]  # none is trained before it is sampled


def test_a_dry_run_reads_no_weights(shared, tmp_path, capsys):
    model = published_vocabulary(tmp_path / "random", shared)
    (model / "model.safetensors").unlink()
    words = ["model=path", f"model.path={model}", f"data.path={shared}/data/GSM8K-train-rl.json", "dry_run=true"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("rl", ["~experiment", "data=file", *words, "rl.max_prompt_tokens=200", "device=cpu"])
    OmegaConf.resolve(cfg)
    rl.run(cfg, tmp_path / "out")
    shown = said(capsys)
    assert shown[0].startswith("7,") and "left out that have prompts longer than rl.max_prompt_tokens=200" in shown[0]
    question = json.loads((shared / "data/GSM8K-train-rl.json").read_text())[0]["question"]
    assert shown[2:4] == ["<|im_start|>user", question]
    assert not (tmp_path / "out").exists()


def test_reinforcement_draws_from_a_mix_without_what_does_not_fit(sources, tmp_path, capsys):
    words = [*sources, "instruction=none", "rl.problems=4", "rl.group_size=2", "rl.filter=none", "rl.max_rounds=1"]
    with pytest.raises(DirlError, match=r"a.jsonl line 1 has no question"):  # it has prompts and responses only
        rl.run(config("rl", *words), tmp_path / "out")
    theirs = [{"question": f"{i}+2?" + "!" * 30 * (i % 3 == 0), "ground_truth_answer": i + 2} for i in range(9)]
    for name in ("a", "b"):
        save(tmp_path / f"{name}.json", theirs)
    parts = f"[{{path: {tmp_path}/a.json, name: a, weight: 3}}, {{path: {tmp_path}/b.json, name: b}}]"
    more = ["data=mix", f"data.sources={parts}", "instruction=none", *words[3:], "rl.max_prompt_tokens=30"]
    more += ["decoding.temperature=1", "optim.lr=1e-3", paid_by_the_letter(tmp_path)]
    rl.run(config("rl", *more), tmp_path / "out")
    counted = "6 training problems of {}; 3 left out that have prompts longer than rl.max_prompt_tokens=30"
    warning = "warning: 33% of 9 rows are not learned from; the longest has 42 tokens"
    assert said(capsys)[:4] == [counted.format("a"), warning, counted.format("b"), warning]
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch/a"], line["epoch/b"]) for line in lines] == [(3 / 6, 1 / 6), (6 / 6, 2 / 6)]
