"""What tests of the command line share."""

import sys
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from dirl_cli.errors import DirlError


@pytest.fixture
def jobs(here, monkeypatch):
    """What a stand-in for every command was handed, as dicts; a config with seed=13 makes it fail."""
    handed = []

    def run(cfg, out):
        handed.append(OmegaConf.to_container(cfg, resolve=True))
        if cfg.get("seed") == 13:
            raise DirlError("13 brings bad luck: take another seed")

    for name in ("sft", "rl", "dpo", "eval", "generate", "chat", "serve", "view", "download"):
        monkeypatch.setitem(sys.modules, f"dirl_cli.commands.{name}", SimpleNamespace(run=run))
    return handed
