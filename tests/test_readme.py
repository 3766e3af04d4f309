"""The README: its code runs, and its map shows every module and folder of the house."""

import re

import torch

from dirl_cli.diffusion.sampling import Candidates
from dirl_cli.diffusion.unmasking import State, find_strategy, reveal
from tests.helpers.paths import ROOT

HOUSE = ROOT / "src" / "dirl_cli"
README = (ROOT / "README.md").read_text()


def code_with(word: str) -> str:
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if word in block]
    return found


def test_the_masking_schedule_of_the_readme_hides_its_share(monkeypatch, tmp_path):
    (tmp_path / "readme_masking.py").write_text(code_with("class Steady"))
    monkeypatch.syspath_prepend(tmp_path)
    from readme_masking import Steady

    masked, weight = Steady(0.5)(torch.arange(4000) // 4, torch.Generator().manual_seed(0))
    assert masked.shape == weight.shape == (1, 4000)
    assert 0.45 < masked.float().mean() < 0.55


def test_the_decoding_strategy_of_the_readme_reveals_two(monkeypatch, tmp_path):
    (tmp_path / "readme_strategy.py").write_text(code_with("def surest_two"))
    monkeypatch.syspath_prepend(tmp_path)
    nothing = torch.tensor([])
    candidates = Candidates(nothing, nothing, torch.tensor([0.1, 0.9, 0.5, 0.7]), nothing)
    state = State(torch.ones(1, 4, dtype=torch.bool), candidates, torch.tensor([1]), 0.9)
    assert reveal(find_strategy("readme_strategy.surest_two"), state)[0].tolist() == [False, True, False, True]


def test_the_tree_shows_every_room():
    tree = README.split("## The house")[1].split("```")[1]
    rooms = {path.parent.name for path in HOUSE.glob("*/__init__.py")}
    assert {line.split("/")[0].strip() for line in tree.splitlines() if line.startswith("  ")} == rooms


def test_the_map_shows_every_file():
    shown, room = set(), ""
    for line in (ROOT / "docs" / "map.md").read_text().splitlines():
        if found := re.match(r"  (\w+)/ ", line):
            room = f"{found[1]}/"
        elif found := re.match(r"(  |    )(\w+\.py) +(\S.*)", line):
            shown.add((room if len(found[1]) == 4 else "") + found[2])
            assert 2 <= len(found[3].split()) <= 8, line
    assert shown == {file.relative_to(HOUSE).as_posix() for file in HOUSE.rglob("*.py") if file.name != "__init__.py"}


def test_the_config_choices_of_the_readme_exist():
    for group, names in re.findall(r"`(algo|masking|decoding|reward)=`?([\w|]+)`", README):
        for name in names.split("|"):
            assert (ROOT / "conf" / group / f"{name}.yaml").exists(), f"{group}={name}"
    for name in re.findall(r"^\| `(\w+)` \|", README, re.M):
        assert (ROOT / "conf" / "algo" / f"{name}.yaml").exists(), name
