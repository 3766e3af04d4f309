"""The table of faults, printed at the end of `make test-faults`."""

from collections.abc import Callable

import pytest

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


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = [dict(report.user_properties) for report in reports if report.when == "call" and report.user_properties]
    if rows:
        terminalreporter.write_line("\n| " + " | ".join(COLUMNS) + " |\n|---|--:|--:|---|")
        for row in sorted(rows, key=lambda row: row["fault"]):
            terminalreporter.write_line("| " + " | ".join(row[column] for column in COLUMNS) + " |")
