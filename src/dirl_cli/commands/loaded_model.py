"""Load the model that a command asks; the jobs of a sweep that ask the same one after another share it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli.build import build
from dirl_cli.console import PlainConsole, working

if TYPE_CHECKING:
    from dirl_cli.models.load import DiffusionLM

# By its settings, of the last job; None outside of a sweep. A job in a thread of its own has none to share.
_of_last_job: "ContextVar[dict[str, DiffusionLM] | None]" = ContextVar("model of the last job", default=None)


@contextmanager
def sharing_models() -> Iterator[None]:
    """Within it, a model that is asked for twice in a row is loaded once."""
    token = _of_last_job.set({})
    try:
        yield
    finally:
        _of_last_job.reset(token)


def load_for_answers(cfg: DictConfig, device: str, console: PlainConsole) -> "DiffusionLM":
    """Load cfg.model for a device, in cfg.dtype and with cfg.attention; what is said meanwhile goes to `console`."""
    settings = json.dumps([OmegaConf.to_container(cfg.model, resolve=True), cfg.dtype, device, cfg.attention])
    models = _of_last_job.get()
    if models is not None and settings in models:
        return models[settings]
    if models is not None:
        models.clear()  # before there are two in memory
    with working(console, "loading the model"):
        lm: DiffusionLM = build(cfg.model).load(cfg.dtype, device, cfg.attention)
    if models is not None:
        models[settings] = lm
    return lm
