"""The installed wheel finds the same config tree as the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.helpers.paths import ROOT


def test_the_wheel_prints_the_same_config_as_the_checkout(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("dirl-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site" / "dirl_lm_eval.pth").read_text() == (ROOT / "src" / "dirl_lm_eval.pth").read_text()
    assert {path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")} == {
        path.relative_to(tmp_path / "site" / "dirl_cli") for path in (tmp_path / "site").rglob("*.yaml")
    }

    page = Path("dirl_cli", "viewer", "page")
    files = {path.name for path in (ROOT / "src" / page).iterdir()}
    assert {path.name for path in (tmp_path / "site" / page).iterdir()} == files > {"page.html", "page.css"}

    def dirl(source, *words):
        command = [sys.executable, "-c", "from dirl_cli.cli.app import app; app()", "sft", *words]
        environment = os.environ | {"PYTHONPATH": str(source)}
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)

    assert dirl(tmp_path / "site", "--cfg", "job") == dirl(ROOT / "src", "--cfg", "job")
    assert str(tmp_path / "site/dirl_cli/conf") in dirl(tmp_path / "site", "--info", "searchpath")
