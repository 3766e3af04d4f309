"""Evaluation cards side by side: python scripts/demo_table.py NAME=RUN_DIRECTORY …"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

CAPTION = (
    "No test problem was trained on. Of some, training held the same numbers and operations under another story: they"
    " count as seen, the others as unseen."
)


def main() -> None:
    table = Table(title="What improved", caption=CAPTION, title_justify="left", caption_justify="left")
    table.add_column("", overflow="fold")
    for column in ("problems", "accuracy %", "unseen numbers %", "tokens per forward", "answer tokens"):
        table.add_column(column, justify="right")

    for argument in sys.argv[1:]:
        name, _, directory = argument.partition("=")
        card = json.loads(Path(directory, "eval_card.json").read_text())
        metrics = card["metrics"]
        table.add_row(
            name,
            f"{metrics['problems']:,}",
            accuracy(metrics),
            accuracy(card["subsets"]["unseen"]),
            f"{metrics['tokens_per_forward']:.2f}",
            f"{metrics['length']:.0f}",
        )
    Console().print(table)


def accuracy(metrics: dict[str, float]) -> str:
    """Such as 63.2 ± 1.5, in percent."""
    return f"{100 * metrics['accuracy']:.1f} ± {100 * metrics['standard_error']:.1f}"


if __name__ == "__main__":
    main()
