"""The GPU-hours that pages and presets tell are the plan's."""

import re
import shlex

import pytest

from dirl_cli.commands import eval as evaluate
from dirl_cli.commands import rl, sft
from dirl_cli.files import conf_dir
from tests.helpers.composed import composed
from tests.helpers.pages import page

COMMANDS = {"sft": sft, "rl": rl, "eval": evaluate}
ROW = re.compile(r"^\| `((?:sft|rl|eval) [^`]+)` \| (\d+) \| ([\d.,]+) \| (at most|about) \|$", re.M)
ROWS = [row for name in ("runs", "recipes") for row in ROW.findall(page(name))]


@pytest.mark.parametrize(("words", "gpus", "hours", "bound"), ROWS)
def test_a_recipe_takes_the_gpu_hours_that_the_page_tells(words, gpus, hours, bound, nothing_here, capsys):
    name, *overrides = shlex.split(words)
    COMMANDS[name].run(composed(name, *overrides, "plan.device=h100", "dry_run=true"), nothing_here / "out")
    said = capsys.readouterr().out
    on = "h100" if gpus == "1" else f"{gpus} × h100"
    assert re.search(rf" on {on}: {bound} .*, {re.escape(hours)} GPU-hours", said)


@pytest.mark.parametrize("experiment", ["dirl8b_sft", "dirl8b_rl", "rl_1gpu", "eval_paper"])
def test_a_preset_for_gpus_tells_the_hours_of_the_page(experiment):
    on_page = {(bound, hours) for words, _, hours, bound in ROWS if f"experiment={experiment}" in words.split()}
    [line] = re.findall("GPU-hours.*", (conf_dir() / f"experiment/{experiment}.yaml").read_text())
    assert len(on_page) == 2
    assert set(re.findall(r"(at most|about) ([\d.,]*\d)", line)) == on_page
