"""The jobs of a sweep that ask the same model one after another load it once."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dirl_cli.commands import loaded_model
from dirl_cli.commands.loaded_model import load_for_answers, sharing_models
from dirl_cli.console import PlainConsole
from dirl_cli.models.tiny import Tiny
from tests.helpers.command_line import dirl


@dataclass(frozen=True)
class Counted:
    """A model that notes each time it is loaded."""

    name: str

    def load(self, *settings: str) -> list[object]:
        loaded.append((self.name, *settings))
        return [self.name]


loaded: list[tuple[str, ...]] = []


def ask(name: str, dtype: str = "float32", device: str = "cpu") -> object:
    model = {"_target_": f"{__name__}.Counted", "name": name}
    cfg = OmegaConf.create({"model": model, "dtype": dtype, "attention": "auto"})
    return load_for_answers(cfg, device, PlainConsole(quiet=True))


def test_within_a_sweep_the_same_model_is_loaded_once_and_one_is_held_at_a_time() -> None:
    loaded.clear()
    with sharing_models():
        first = ask("a")
        assert ask("a") is first
        ask("a", dtype="bfloat16")
        ask("b", dtype="bfloat16")
        assert len(loaded_model._of_last_job.get() or {}) == 1
        assert ask("a") is not first
    assert [name for name, *_ in loaded] == ["a", "a", "b", "a"]
    assert loaded[1] == ("a", "bfloat16", "cpu", "auto")


def test_outside_of_a_sweep_a_model_is_loaded_each_time_since_its_files_may_have_changed() -> None:
    loaded.clear()
    with sharing_models():
        ask("a")
    assert ask("a") is not ask("a")
    assert len(loaded) == 3


def test_a_mixed_run_loads_its_model_once_and_answers_as_single_ones_do(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    monkeypatch.setattr(Tiny, "load", lambda self, *settings, load=Tiny.load: loads.append(1) or load(self, *settings))
    settings = ["limit=2", "decoding.max_new_tokens=6", "decoding.temperature=1", "grade_workers=1"]
    assert dirl("eval", "bench=[arithmetic,sudoku]", *settings).exit_code == 0
    assert len(loads) == 1
    assert dirl("eval", "bench=sudoku", "name=single", *settings).exit_code == 0
    assert len(loads) == 2
    assert texts(here / "runs/eval/tiny-sudoku") == texts(here / "runs/eval/single")


def texts(out: Path) -> list[str]:
    return sorted(json.loads(line)["text"] for line in (out / "answers.jsonl").read_text().splitlines())
