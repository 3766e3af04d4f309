"""What the check runs on: the device, the versions, and that the installed package is this checkout's.

python -m benchmarks.gpu.machine
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.shapes import REPOSITORY, machine

PACKAGES = ["transformers", "accelerate", "triton", "lmdeploy", "bitsandbytes", "peft"]


def main() -> None:
    print(f"{machine()}, Python {sys.version.split()[0]}")
    for package in ["dirl", *PACKAGES]:
        try:
            print(f"* {package} {version(package)}")
        except PackageNotFoundError:
            print(f"* {package}: not installed")
    if stale := differing(REPOSITORY / "src/dirl_cli", installed()):
        names = ", ".join(sorted(map(str, stale))[:5])
        sys.exit(f"the installed dirl is not this checkout's ({names}): build its wheel anew, pip wheel --no-deps .")


def installed() -> Path:
    """The directory of the package that `import dirl_cli` finds."""
    spec = find_spec("dirl_cli")
    if spec is None or spec.origin is None:
        sys.exit("dirl is not installed: pip install ., or name a folder with its wheel")
    return Path(spec.origin).parent


def differing(ours: Path, theirs: Path) -> set[Path]:
    """The Python files, relative to either package's directory, that only one has or that are not the same."""
    stale = set()
    for one, other in ((ours, theirs), (theirs, ours)):
        for file in one.rglob("*.py"):
            name = file.relative_to(one)
            if not (other / name).exists() or (other / name).read_bytes() != file.read_bytes():
                stale.add(name)
    return stale


if __name__ == "__main__":
    main()
