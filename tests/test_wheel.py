"""The installed wheel finds the same config tree as the checkout."""

import subprocess
import sys
import zipfile

from tests.helpers.paths import ROOT


def test_the_wheel_prints_the_same_config_as_the_checkout(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("dirl-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert {path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")} == {
        path.relative_to(tmp_path / "site" / "dirl_cli") for path in (tmp_path / "site").rglob("*.yaml")
    }
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from dirl_cli.cli.app import app; app()"
    printed = [
        subprocess.check_output([sys.executable, "-c", code, source, "sft", "--cfg", "job"], cwd=tmp_path, text=True)
        for source in (tmp_path / "site", ROOT / "src")
    ]
    assert printed[0] == printed[1]
    searched = [sys.executable, "-c", code, tmp_path / "site", "sft", "--info", "searchpath"]
    assert str(tmp_path / "site/dirl_cli/conf") in subprocess.check_output(searched, cwd=tmp_path, text=True)
