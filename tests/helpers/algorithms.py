"""The objectives of conf/algo as the command line composes them."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli.build import build
from dirl_cli.rl.objective import Objective
from tests.helpers.paths import ROOT

ALGO = ROOT / "conf" / "algo"
ALGORITHMS = sorted(path.stem for path in ALGO.glob("*.yaml"))


def algorithm_config(name: str, **changed: Any) -> DictConfig:
    """A file of conf/algo over the options that every objective has, with some values changed."""
    file = OmegaConf.load(ALGO / f"{name}.yaml")
    assert file.pop("defaults")[0] == {"options@_here_": "default"}
    if OmegaConf.is_missing(file, "teacher"):  # which a run has to give
        changed = {"teacher": "models/teacher", **changed}
    return OmegaConf.merge(OmegaConf.load(ALGO / "options" / "default.yaml"), file, changed)


def algorithm(name: str, **changed: Any) -> Objective:
    return build(algorithm_config(name, **changed))
