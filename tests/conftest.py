import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.paths import SHARED

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait for each other make tests slow
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, where it is
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and all they start, ignore Ctrl-C


def pytest_configure(config: pytest.Config) -> None:
    """Before the workers start, LMDeploy's yapf writes the cache of its grammar: two at once read half a file."""
    if not hasattr(config, "workerinput") and find_spec("yapf"):
        import_module("yapf")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Tokens and data sets are kept with the files of the tests, not in the user's cache."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real benchmarks, tokenizer and golden cases beside the checkout; without them the test is skipped."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}")
    return SHARED


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, and a process that finds itself unchanged after a command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    levels = {logger: logger.level for logger in (logging.root, logging.getLogger("hydra"))}
    yield tmp_path
    for logger, level in levels.items():
        logger.setLevel(level)  # `--info` leaves it at DEBUG
    for handler in [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]:
        logging.root.removeHandler(handler)  # of Hydra's, once it has explained a config
