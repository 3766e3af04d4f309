from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real benchmarks, tokenizer and golden cases beside the checkout; without them the test is skipped."""
    directory = Path(__file__).parents[2] / "shared"
    if not directory.is_dir():
        pytest.skip(f"needs the real data in {directory}")
    return directory
