"""The site that `make docs` builds of the pages: its links lead somewhere, and it asks nothing of the network."""

import re
from dataclasses import dataclass

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("mkdocs", reason="wants the extra `docs`")
pytest.importorskip("material", reason="wants the extra `docs`")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from dirl_cli.cli.schema import SCHEMAS
from scripts.site_docstrings import with_lists
from scripts.site_links import outside_code, place, targets
from scripts.site_settings import command_settings, explanations, group_settings, groups, of_docstring

pytestmark = pytest.mark.timeout(600)  # torch and what else the configuration names is imported


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; to build it is the test of links and headings, since it is strict about them."""
    directory = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(directory), strict=True))
    return directory


def test_the_site_has_every_page(site):
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "RESULTS.md"]:
        name = page.relative_to(ROOT).as_posix().removeprefix("docs/")
        assert (site / name).with_suffix(".html").is_file()
    assert "block-diffusion" in (site / "index.html").read_text()


def test_the_site_asks_nothing_of_the_network(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"?([^\s\">]+)", page.read_text())
        loaded += re.findall(r"<link[^>]*\bhref=\"?([^\s\">]+)", page.read_text())
        assert loaded and not [address for address in loaded if "//" in address], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()[\"' ]*(https?:)?//", sheet.read_text()), sheet


def test_a_link_into_the_repository_leads_to_a_page_that_shows_it(site):
    [there] = re.findall(r'href="?([^" >]*time\.py\.html)', (site / "runs.html").read_text())
    assert "TimePlan" in (site / there).read_text()


@pytest.mark.parametrize("link", ["nowhere.md", "../src/nowhere.py", "#nowhere", "eval.md#nowhere"])
def test_a_link_that_leads_nowhere_is_an_error(link, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "eval.md").write_text(f"# Evaluating\n\n[a link]({link})\n")
    config = load_config(
        str(ROOT / "mkdocs.yml"),
        docs_dir=str(tmp_path / "docs"),
        site_dir=str(tmp_path / "site"),
        nav=[{"Eval": "eval.md"}],
        hooks=[],
        plugins=[],
        strict=True,
    )
    with pytest.raises(Abort):
        build(config)


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_of_a_command_is_explained(command):
    settings = command_settings(command)
    assert settings
    assert [setting.key for setting in settings if not setting.line] == []


@pytest.mark.parametrize("group", groups())
def test_every_key_of_a_group_is_explained(group):
    missing = [
        f"conf/{group}/{choice}.yaml: {setting.key}"
        for choice, settings in group_settings(group).items()
        for setting in settings
        if not setting.line
    ]
    assert missing == []


def test_the_reference_has_every_key_with_its_default(site):
    rl = (site / "configuration" / "rl.html").read_text()
    for setting in command_settings("rl"):
        assert f"<code>{setting.key.replace('_', '&#95;')}</code>" in rl or f"<code>{setting.key}</code>" in rl
    optim = (site / "configuration" / "groups" / "optim.html").read_text()
    assert "<code>5e-7</code>" in optim and "<code>momentum" not in optim and "<code>optim.momentum</code>" in optim


def test_a_key_is_explained_by_its_line_and_what_follows_or_by_what_stands_above():
    text = "# Of the file.\nsteps: 3   # how many\n           # there are\n"
    text += "rl:\n  # of both\n  old: a\n  new: b  # this\nbare: 1\n"
    assert explanations(text) == {"steps": "how many there are", "rl.old": "of both", "rl.new": "this"}


def test_a_key_is_explained_by_a_docstring():
    @dataclass
    class Kind:
        """What it is, drawn from `seed`.

        low, high: the bounds. steps: how many
        of them.
        """

        low: int
        high: int
        steps: int
        seed: int

    lines = [of_docstring(Kind, name) for name in ("high", "steps", "seed")]
    assert lines == ["the bounds", "how many of them", "What it is, drawn from `seed`"]


def test_parameters_of_a_docstring_are_a_list():
    docstring = "Load it.\n\npath, name: where\nit lies.\nseed: of all.\nRaises DirlError: never."
    listed = "Load it.\n\n\n* `path`, `name`: where\n  it lies.\n* `seed`: of all.\n\nRaises DirlError: never."
    assert with_lists(docstring) == listed


def test_code_is_left_alone_and_links_of_code_are_links():
    page = "[`a`](b.md) and `x[0](c.md)`\n\n```\n[d](e.md)\n```\n"
    assert targets("docs/page.md", page) == ["docs/b.md"]
    assert outside_code(page, str.upper) == "[`a`](B.MD) AND `x[0](c.md)`\n\n```\n[d](e.md)\n```\n"


def test_each_file_of_the_repository_has_a_place():
    names = ("README.md", "docs/rl.md", "benchmarks/RESULTS.md", "conf/rl.yaml", "conf/algo")
    pages = ["index.md", "rl.md", "benchmarks/RESULTS.md", "conf/rl.yaml.md", "configuration/groups/algo.md"]
    assert [place(name) for name in names] == pages


def test_a_notebook_is_a_page_of_prose_and_code(site):
    page = (site / "notebooks" / "look_inside.ipynb.html").read_text()
    assert "Why order matters" in page and "load_sampler" in page and "cell_type" not in page
