"""The table of faults, printed at the end of `make test-faults`."""

import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.faults.served_runs import Servers
from tests.faults.trials import config, finished, result, save_random_model

COLUMNS = ("fault", "tried", "survived", "lost")
Tell = Callable[[str, int, int, str], None]


@pytest.fixture
def tell(record_property) -> Tell:
    """Puts a row into the table: a fault, how often it was tried and survived, and what was lost."""

    def note(fault: str, tried: int, survived: int, lost: str = "nothing") -> None:
        for column, value in zip(COLUMNS, (fault, tried, survived, lost), strict=True):
            record_property(column, str(value))
        assert survived == tried, f"{fault}: {tried - survived} of {tried} not survived"

    return note


@pytest.fixture(scope="module")
def word(tmp_path_factory) -> str:
    torch.set_num_threads(1)
    return save_random_model(tmp_path_factory.mktemp("model"), 8.0)


@pytest.fixture(scope="module")
def expected(word, tmp_path_factory) -> dict:
    """Of a run that samples itself, each answer alone in its batch."""
    out = tmp_path_factory.mktemp("own") / "run"
    assert finished("rl", config("rl", word, "rollout.max_batch=1"), out)
    return result(out)


@pytest.fixture(scope="module")
def servers(word, tmp_path_factory) -> Iterator[Servers]:
    two = Servers(word, tmp_path_factory.mktemp("servers"))
    yield two
    for child in two.children:
        child.send(signal.SIGKILL)
        child.end()


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = [dict(report.user_properties) for report in reports if report.when == "call" and report.user_properties]
    if rows:
        terminalreporter.write_line("\n| " + " | ".join(COLUMNS) + " |\n|---|--:|--:|---|")
        for row in sorted(rows, key=lambda row: row["fault"]):
            terminalreporter.write_line("| " + " | ".join(row[column] for column in COLUMNS) + " |")
