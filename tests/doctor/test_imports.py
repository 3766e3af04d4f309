"""A package that fails, ends the process or hangs is told of, and those after it are tried all the same."""

import pytest

from dirl_cli.doctor.imports import import_all, reason_of

BROKEN = "import os, signal\nprint('noise')\n"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "sound_one.py").write_text("print('noise on standard output')\n")
    (tmp_path / "fails.py").write_text("raise OSError('libfails.so.1: cannot open shared object file')\n")
    (tmp_path / "crashes.py").write_text(BROKEN + "os.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")


def test_what_fails_is_told_with_its_reason_and_the_rest_is_tried(modules):
    results = import_all(["fails", "crashes", "sound_one"])
    assert results["fails"].error == "OSError: libfails.so.1: cannot open shared object file"
    assert results["crashes"].error == "SIGSEGV ended the process"
    assert results["sound_one"].error == ""


def test_what_hangs_is_given_up(modules):
    results = import_all(["sound_one", "hangs"], seconds=8)
    assert results["sound_one"].error == "" and "not done after 8 s" in results["hangs"].error


def test_the_reason_is_the_last_line_that_a_process_wrote():
    assert reason_of(1, "Traceback …\n  File …\nImportError: no such symbol\n\n") == "ImportError: no such symbol"
    assert reason_of(3, "") == "it ended with exit code 3"
