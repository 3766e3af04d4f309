"""The pages: their code runs, their words are the code's, their links lead somewhere and their maps are complete."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dirl_cli.diffusion.sampling import Candidates
from dirl_cli.diffusion.unmasking import State, find_strategy, reveal
from dirl_cli.reward.rewards import find_reward
from dirl_cli.types import Problem
from tests.helpers.pages import PAGES, README, files, page
from tests.helpers.paths import ROOT

HOUSE = ROOT / "src" / "dirl_cli"


def test_the_masking_schedule_of_the_page_hides_its_share(monkeypatch, tmp_path):
    (tmp_path / "page_masking.py").write_text(files(page("sft"))["mine.py"])
    monkeypatch.syspath_prepend(tmp_path)
    from page_masking import Steady

    masked, weight = Steady(0.5)(torch.arange(4000) // 4, torch.Generator().manual_seed(0))
    assert masked.shape == weight.shape == (1, 4000)
    assert 0.45 < masked.float().mean() < 0.55


def test_the_decoding_strategy_of_the_page_reveals_two(monkeypatch, tmp_path):
    (tmp_path / "page_strategy.py").write_text(files(page("eval"))["mine.py"])
    monkeypatch.syspath_prepend(tmp_path)
    nothing = torch.tensor([])
    candidates = Candidates(nothing, nothing, torch.tensor([0.1, 0.9, 0.5, 0.7]), nothing)
    state = State(torch.ones(1, 4, dtype=torch.bool), candidates, torch.tensor([1]), 0.9)
    assert reveal(find_strategy("page_strategy.surest_two"), state)[0].tolist() == [False, True, False, True]


def test_the_reward_of_the_page_prefers_the_shorter_answer(tmp_path):
    (tmp_path / "my_rewards.py").write_text(files(page("rl"))["my_rewards.py"])
    brevity = find_reward(f"{tmp_path / 'my_rewards.py'}:brevity")
    rewards = [brevity(SimpleNamespace(completion=text, problem=Problem("1", "", ""))) for text in ("", "4", "2+2=4")]
    assert rewards == sorted(rewards, reverse=True) and rewards[0] == 1


def test_the_tree_shows_every_room():
    tree = README.split("## The house")[1].split("```")[1]
    rooms = {path.parent.name for path in HOUSE.glob("*/__init__.py")}
    assert {line.split("/")[0].strip() for line in tree.splitlines() if line.startswith("  ")} == rooms


def test_the_map_shows_every_file():
    shown, room = set(), ""
    for line in page("map").splitlines():
        if header := re.match(r"  (\w+)/ ", line):
            room = f"{header[1]}/"
        elif entry := re.match(r"(  |    )(\w+\.py) +(\S.*)", line):
            shown.add((room if len(entry[1]) == 4 else "") + entry[2])
            assert 2 <= len(entry[3].split()) <= 8, line
    assert shown == {file.relative_to(HOUSE).as_posix() for file in HOUSE.rglob("*.py") if file.name != "__init__.py"}


def test_the_config_choices_that_pages_name_exist():
    for path in PAGES:
        choices = re.findall(
            r"`(algo|likelihood|masking|decoding|reward|annealing|peft|instruction)=(\w+)`", path.read_text()
        )
        for group, name in choices:
            assert (ROOT / "conf" / group / f"{name}.yaml").exists(), f"{path.name}: {group}={name}"


@pytest.mark.parametrize(
    ("name", "head", "group"),
    [
        ("rl", "`algo=`", "algo"),
        ("rl", "`critic=`", "critic"),
        ("sft", "`masking=`", "masking"),
        ("dpo", "`likelihood=`", "likelihood"),
        ("eval", "`decoding=`", "decoding"),
        ("data", "`instruction=`", "instruction"),
        ("runs", "preset", "experiment"),
    ],
)
def test_the_table_of_a_group_shows_every_choice(name, head, group):
    [table] = re.findall(rf"^\| {head} \|.*\n\|-.*\n((?:\|.*\n)+)", page(name), re.M)
    shown = [choice for row in table.splitlines() for choice in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(shown) == sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        destination = (path.parent / file).resolve() if file else path
        assert destination.exists(), target
        assert not anchor or anchor in anchors(destination.read_text()), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_files_that_a_page_names_exist(path):
    """But for placeholders, which have capitals: conf/NAME.yaml."""
    names = re.findall(r"`((?:benchmarks|conf|docs|scripts|src|tests)/[a-z0-9_/.]+)`", path.read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


def names_in(file: Path) -> set[str]:
    """What a module defines, takes, sets or asks for by name, and its strings."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                names.add(name)
            case ast.arg(arg=name) | ast.Attribute(attr=name) | ast.Name(id=name) | ast.keyword(arg=str(name)):
                names.add(name)
            case ast.Constant(value=str(name)):
                names.add(name)
    return names


def glossary() -> list[tuple[str, str, str]]:
    rows = [row.strip("| ").split(" | ") for row in page("glossary").splitlines() if row.startswith("| ")]
    return [(term, what, where) for term, what, where in rows if term != "term"]


def test_the_glossary_has_each_term_once_with_a_sentence():
    terms = [term for term, _, _ in glossary()]
    assert len(set(terms)) == len(terms) >= 40
    for term, what, _ in glossary():
        assert what.endswith(".") and len(what.split()) >= 5, term


def test_the_words_of_the_glossary_are_the_codes():
    of_house = set().union(*(names_in(file) for file in HOUSE.rglob("*.py")))
    for term, what, where in glossary():
        file, *names = re.findall(r"`([^`]+)`", where)
        assert (HOUSE / file).is_file(), f"{term}: {file}"
        assert set(names) <= names_in(HOUSE / file), f"{term}: {names} in {file}"
        for name in re.findall(r"`([^`]+)`", what):
            assert name in of_house or (ROOT / name).exists(), f"{term}: {name}"


def test_the_sentences_that_are_answered_are_the_codes():
    """Those that `docs/faq.md` quotes, wherever a string is broken into lines."""
    code = "\n".join(file.read_text() for file in HOUSE.rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", code)
    quoted = re.findall(r'^\*\*"(.+?)"\*\*', page("faq"), re.M)
    assert len(quoted) >= 8
    assert [sentence for sentence in quoted if sentence not in code] == []


def test_the_changelog_has_the_version():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version and f"({version[1]})" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 180


def test_pages_say_a_thing_once():
    """No sentence of some length stands in two pages, nor twice in one."""
    seen: dict[str, str] = {}
    for path in PAGES:
        prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
        for sentence in re.split(r"(?<=[.:;])\s+", " ".join(prose.split())):
            if len(sentence.split()) >= 12:
                assert sentence not in seen, f"{path.name} and {seen[sentence]}: {sentence}"
                seen[sentence] = path.name
