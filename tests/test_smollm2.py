"""From SmolLM2 to blocks: every stage of the script is accepted, and the data script reads both forms of GSM8K."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dirl_cli.cli.app import app
from dirl_cli.evaluation.compare import Difference
from tests.helpers.paths import ROOT

SCRIPT = ROOT / "scripts/smollm2.sh"


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_every_stage_of_the_script_is_accepted(machine, here, monkeypatch):
    """The script as bash runs it, with stand-ins for its programs that note their words."""
    monkeypatch.setenv("PATH", f"{here}:{'/usr/bin:/bin'}")
    monkeypatch.setenv("GSM8K_TEST", "test.json")
    for name in ("dirl", "python"):
        (here / name).write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> words; printf "\\n" >> words\n')
        (here / name).chmod(0o755)
    subprocess.run(["bash", SCRIPT, machine], check=True, capture_output=True, cwd=here)
    given = [line.split("\0")[:-1] for line in (here / "words").read_text().splitlines()]
    commands = [words for program, *words in given if program == "dirl"]
    assert len(given) - len(commands) == 3
    for stage in ("converted", "words", "mixed", "words-rl", "gsm8k-rl"):
        Path(f"runs/smollm2/{stage}/model").mkdir(parents=True)
    for words in commands[1:]:  # all but the download, which has no configuration to show
        result = CliRunner().invoke(app, [*words, "--cfg", "job"])
        assert result.exit_code == 0, (words, result.output)
    [reinforced] = [words for words in commands if "experiment=smollm2_words_rl" in words]
    shown = CliRunner().invoke(app, [*reinforced, "--cfg", "job"]).output
    assert f"problems: {64 if machine == 'gpu' else 16}" in shown


def data_script(*words: str) -> None:
    sys.argv[1:] = words
    runpy.run_path(str(ROOT / "scripts/smollm2_data.py"), run_name="__main__")


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


PUBLISHED = {"question": "2+3*4?", "answer": "3*4=<<3*4=12>>12\n2+12=<<2+12=14>>14\n#### 14"}
WRITTEN_OUT = {
    "prompt": "<|im_start|>user\n2+3*4?\nPlease reason step by step, and put your final answer within $\\boxed{}$."
    "<|im_end|>\n<|im_start|>assistant\n",
    "response": "3*4=12\n2+12=14\nThe answer is $\\boxed{14}$.<|im_end|><|endoftext|>",
}


@pytest.mark.parametrize("row", [PUBLISHED, WRITTEN_OUT], ids=["openai/gsm8k", "prompt and response"])
def test_both_forms_of_gsm8k_become_the_same_rows(row, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["smollm2_data.py"])
    (tmp_path / "train.json").write_text(json.dumps([row]))
    data_script("gsm8k", str(tmp_path / "data"), str(tmp_path / "train.json"))
    response = "3*4=12\n2+12=14\nThe answer is $\\boxed{14}$."
    assert rows(tmp_path / "data/demonstrations.jsonl") == [{"question": "2+3*4?", "response": response}]
    assert rows(tmp_path / "data/problems.jsonl") == [{"question": "2+3*4?", "ground_truth_answer": "14"}]
    assert rows(tmp_path / "data/questions.jsonl") == [{"question": "2+3*4?"}]


def test_of_the_models_own_answers_those_that_ended_are_learned_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["smollm2_data.py"])
    lines = [{"question": f"{reason}?", "text": "So.", "stop_reason": reason} for reason in ("stop", "length")]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data_script("own", str(tmp_path), str(tmp_path / "completions.jsonl"))
    assert rows(tmp_path / "own.jsonl") == [{"question": "stop?", "response": "So."}]


def test_a_file_that_is_not_there_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["smollm2_data.py"])
    with pytest.raises(SystemExit, match=r"smollm2_data.py: nowhere.json does not exist"):
        data_script("gsm8k", str(tmp_path), "nowhere.json")


def test_a_gain_whose_error_cannot_be_told_is_told_without_it():
    gained = runpy.run_path(str(ROOT / "scripts/smollm2_table.py"))["gained"]
    assert gained(Difference(31.0, 42.5, 5.0)) == "31.0 → 42.5 %, 2.3 standard errors."
    assert gained(Difference(0.0, 100.0, None)) == "0.0 → 100.0 %."
