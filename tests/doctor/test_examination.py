"""The screen of `dirl doctor`: in a pipe a line a check, in a terminal as wide as that is."""

import io

import pytest

from dirl_cli.console import PlainConsole
from dirl_cli.doctor import examination
from dirl_cli.doctor.checks import EXTRAS, Check
from dirl_cli.doctor.imports import Imported
from dirl_cli.doctor.requirements import checkout_directory, read_requirements
from tests.helpers.command_line import dirl

FULL = Check("disk", "broken", "/data is full: " + "a long story " * 12, "make room, or begin in another directory")
GONE = Check("peft", "absent", "LoRA", "pip install 'peft>=0.21'")


def shown(width, terminal):
    file = io.StringIO()
    examination.show([FULL], [GONE], PlainConsole(file=file, width=width, force_terminal=terminal, color_system=None))
    return file.getvalue().splitlines()


def test_in_a_pipe_a_check_and_a_remedy_are_a_line_each():
    lines = shown(60, terminal=False)
    assert lines[0].startswith("broken   disk        /data is full") and lines[0].rstrip().endswith("long story")
    assert lines[1].strip() == f"→ {FULL.remedy}"
    assert "absent   peft        LoRA: pip install 'peft>=0.21'" in lines
    assert lines[-1] == "1 thing to mend: disk"


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_terminals_lines_are_as_wide_as_it_is(width):
    lines = shown(width, terminal=True)
    assert all(len(line) <= width for line in lines if "→" not in line)
    assert all(line.startswith(" " * 20) for line in lines[1 : lines.index("")])


@pytest.mark.parametrize(("torch", "code"), [(Imported(facts={"cuda": None, "threads": 1}), 0), (Imported("gone"), 1)])
def test_the_exit_code_says_whether_anything_is_broken(here, monkeypatch, torch, code):
    monkeypatch.setattr(examination, "import_all", lambda names: {"torch": torch})
    monkeypatch.setattr(examination.machine, "hub_problem", lambda seconds: "unplugged")
    monkeypatch.setattr(examination.machine, "read_driver", lambda: None)
    monkeypatch.setattr(examination.machine, "gpus_on_bus", lambda: 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = dirl("doctor")
    assert result.exit_code == code, result.output
    assert ("Nothing to mend." in result.output) == (code == 0)


def test_every_extra_is_told_but_the_developers():
    assert set(read_requirements(checkout_directory()).extras) - {"dev", "docs"} == set(EXTRAS)
