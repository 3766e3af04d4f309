"""The commands of the pages are accepted word for word, and the Python of the README runs."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from dirl_cli.cli.app import app
from dirl_cli.doctor.imports import Imported
from dirl_cli.models.tiny import Tiny
from tests.helpers.pages import PAGES, README, code_blocks, commands, files
from tests.helpers.run_directories import make_run

TRIED_ELSEWHERE = ("CONTRIBUTING",)  # with what it adds to the code: test_contributing.py
COMMANDS = ("chat", "download", "dpo", "eval", "generate", "merge", "rl", "serve", "sft", "view")
LOOKING = ("doctor", "runs")  # these have no config
COMMANDS_OF_PAGES = [
    pytest.param(path, words, id=f"{path.stem} {' '.join(words)}")
    for path in PAGES
    if path.stem not in TRIED_ELSEWHERE
    for words in commands(path.read_text())
    if words[0] not in LOOKING
]

LOOKING_OF_PAGES = [
    pytest.param(words, id=f"{path.stem} {' '.join(words)}")
    for path in PAGES
    for words in commands(path.read_text())
    if words[0] in LOOKING
]


@pytest.fixture
def own_modules(here):
    """Modules imported from the test's directory are forgotten afterwards: another page may call its own the same."""
    yield here
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(here):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dirl sft a='b c' | tail", ["sft", "a=b c"]),
        ("echo 2+2 | dirl generate", ["generate"]),
        ("cd nowhere || A=1 B=2 dirl rl &", ["rl"]),
        ("text=$(dirl runs show)", ["runs", "show"]),
        ("if true; then (time dirl eval); fi", ["eval"]),
        ("exec nohup env A=1 dirl chat > log", ["chat"]),
        ("srun -N 2 bash -c 'dirl serve port=$((80 + 1))'", ["serve", "port=81"]),
        ("dirl view a \\\n  b  # shown", ["view", "a", "b"]),
    ],
)
def test_a_command_is_found_wherever_it_stands(line, words):
    assert commands(f"```bash\n{line}\n```\n") == [words]


def test_what_is_no_command_is_not_taken_for_one():
    lines = ["# dirl rl", "lm_eval --model dirl --tasks pens", "pip show dirl", "echo 'dirl rl'"]
    assert commands("```bash\n" + "\n".join(lines) + "\n```\n") == []


@pytest.mark.parametrize(("path", "words"), COMMANDS_OF_PAGES)
def test_every_command_is_accepted(path, words, own_modules, monkeypatch):
    handed = []
    for name in COMMANDS:
        stand_in = SimpleNamespace(run=lambda cfg, out: handed.append(OmegaConf.to_container(cfg)))
        monkeypatch.setitem(sys.modules, f"dirl_cli.commands.{name}", stand_in)
    monkeypatch.setattr("dirl_cli.cli.launch.start_workers", lambda name, cfg, out, files: handed.append(cfg))
    for name, value in {"MASTER_ADDR": "node1", "SLURM_NODEID": "0"}.items():
        monkeypatch.setenv(name, value)
    words = [word.replace("out=/shared", "out=shared") for word in words if not word.startswith("hydra")]
    for name, text in files(path.read_text()).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    for directory in ("my_model", "my_adapter", "my_causal_model", *re.findall(r"runs/[\w/-]+", " ".join(words))):
        Path(directory).mkdir(parents=True, exist_ok=True)
    for name in ("my.jsonl", "problems.jsonl", "pairs.jsonl", "answers.jsonl"):
        Path(name).touch()
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert handed or " is prepared: " in result.output
    if "rollout=lmdeploy" in words:
        assert {cfg["rollout"]["_target_"] for cfg in handed} == {"dirl_cli.rollout.engines.Lmdeploy"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_another_launcher_starts_was_prepared(path):
    text = path.read_text()
    prepared = [[words[0], word[4:]] for words in commands(text) for word in words if word.startswith("out=")]
    assert [words for words in commands(text, "dirl_cli.cli.worker") if words not in prepared] == []


@pytest.mark.parametrize("words", LOOKING_OF_PAGES)
def test_every_command_that_looks_is_accepted(words, here, monkeypatch):
    monkeypatch.setattr("dirl_cli.doctor.examination.import_all", lambda names: {"torch": Imported()})
    for directory in re.findall(r"runs/[\w/-]+", " ".join(words)):
        make_run(Path(directory))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


def test_the_example_in_python_of_the_readme_runs(here):
    Tiny(hidden_size=32, num_hidden_layers=1, intermediate_size=32).load("float32", "cpu").save(here / "model")
    [code] = code_blocks("python", README)
    code = code.replace("runs/rl/tiny-arithmetic-dipo", str(here / "model"))
    names: dict = {}
    exec(code.replace("max_new_tokens=64", "max_new_tokens=8"), names)
    assert [len(logprobs) for logprobs in names["logprobs"]] == [len(answer.token_ids) for answer in names["answers"]]
