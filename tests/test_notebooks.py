"""The notebooks run from top to bottom, with less training than they have for their readers."""

import os
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="wants the extra `notebooks`")
nbclient = pytest.importorskip("nbclient", reason="wants the extra `notebooks`")
pytest.importorskip("ipykernel", reason="wants the extra `notebooks`")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# An untrained model is never right, so that it is rewarded for short answers.
LESS = {"SFT_STEPS": "2", "RL_STEPS": "2", "QUESTIONS": "4", "REWARD": "dapo"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_of_a_notebook_is_what_was_written_by_hand(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    for name, value in LESS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # a cell that fails raises

    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == sum("plt.show()" in cell.source for cell in notebook.cells if cell.cell_type == "code")
