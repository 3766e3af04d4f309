import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait for each other make tests slow


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real benchmarks, tokenizer and golden cases beside the checkout; without them the test is skipped."""
    directory = Path(__file__).parents[2] / "shared"
    if not directory.is_dir():
        pytest.skip(f"needs the real data in {directory}")
    return directory
