"""Evaluation cards side by side: python scripts/demo_table.py NAME=RUN_DIRECTORY …"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main() -> None:
    table = Table(title="What improved", title_justify="left")
    for column in ("", "accuracy", "on unseen numbers", "tokens per forward", "answer length"):
        table.add_column(column, justify="left" if not column else "right")
    for argument in sys.argv[1:]:
        name, _, directory = argument.partition("=")
        card = json.loads(Path(directory, "eval_card.json").read_text())
        found, unseen = card["metrics"], card["subsets"]["unseen"]
        table.add_row(
            name,
            f"{100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f} %",
            f"{100 * unseen['accuracy']:.1f} ± {100 * unseen['standard_error']:.1f} %",
            f"{found['tokens_per_forward']:.2f}",
            f"{found['length']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
