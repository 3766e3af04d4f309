from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import PreTrainedConfig

from dirl_cli.plan.architecture import Architecture, architecture

COUNTED: dict[tuple[str, ...], Architecture] = {}


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is counted once for all plans of it: most of a plan's time goes into that."""

    def counted(config: PreTrainedConfig, *how: object) -> Architecture:
        key = (config.to_json_string(), *map(repr, how))
        if key not in COUNTED:
            COUNTED[key] = architecture(config, *how)
        return COUNTED[key]

    monkeypatch.setattr("dirl_cli.plan.forecast.architecture", counted)


@pytest.fixture
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine to which nothing was downloaded."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path
