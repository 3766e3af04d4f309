"""The quick start: its commands run on the embedded model with the native engine."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dirl_cli.cli.app import app
from dirl_cli.models.tiny import Tiny
from tests.helpers.pages import code_blocks, commands, page

COMMANDS = commands(page("quickstart"))


def dirl(*words):
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def model(here):
    Tiny(hidden_size=32, num_hidden_layers=1, intermediate_size=32).load("float32", "cpu").save(here / "model")
    return str(here / "model")


def on(model, words):
    """The same on another model, its answers short, with the native engine."""
    words = [word.replace("lmdeploy", "native") for word in words if not word.startswith(("bench=", "experiment="))]
    words = [f"model={model}" if word.startswith("model=") else word for word in words]
    return [*words, "decoding.max_new_tokens=8", "device=cpu"]


def test_the_example_of_sampling_runs(model):
    [words] = [words for words in COMMANDS if words[0] == "generate"]
    result = dirl(*on(model, words))
    assert result.exit_code == 0, result.output
    [line] = [json.loads(line) for file in Path("runs").rglob("completions.jsonl") for line in file.open()]
    assert max(line["reveal_step"]) <= 4


def test_the_example_of_evaluating_runs(model):
    words = next(words for words in COMMANDS if words[0] == "eval")
    result = dirl(*on(model, words), "bench=arithmetic", "limit=2")
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.output


def test_the_example_in_python_runs(model, capsys):
    [code] = code_blocks("python", page("quickstart"))
    code = code.replace("OpenMOSS-Team/DiRL-8B-Instruct", model).replace("lmdeploy", "native").replace("2048", "8")
    names: dict = {}
    exec(code, names)
    assert len(names["answer"].reveal_step) >= 8
    assert str(names["answer"].reveal_step) in capsys.readouterr().out


@pytest.mark.parametrize("words", [("generate", "prompt=a"), ("eval",), ("eval", "dry_run=true"), ("rl",), ("serve",)])
def test_a_strategy_that_the_engine_lacks_is_refused_before_a_model_is_looked_for(here, words):
    result = dirl(*words, "model=sdar8b", "rollout=lmdeploy", "decoding=bacd", "device=cpu")
    assert result.exit_code == 1
    assert (
        "decoding.strategy=bounded_adaptive wants rollout=native: LMDeploy does not"
        in f"{result.output}{result.exception}"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is none")
def test_the_engine_of_the_example_is_refused_without_a_gpu_before_a_model_is_looked_for(here):
    [words] = [words for words in COMMANDS if words[0] == "generate"]
    result = dirl(*words)
    assert result.exit_code == 1
    assert "rollout=lmdeploy wants" in str(result.exception)
