"""What a model would see: the first examples with their trained tokens marked, and how long all of them are."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dirl_cli.data.chat import Encoded
from dirl_cli.data.tokens import TokenTable
from dirl_cli.reward.boxed import reference

SHOWN = 2  # examples of each source


def show_examples(
    sources: Mapping[str, TokenTable],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    answers: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Print the first examples of each source as the model gets them, and a table of their lengths.

    answers: of problems, what each source's are graded by.
    """
    for name, tokens in sources.items():
        for i in range(min(SHOWN, len(tokens))):
            console.rule(f"{name}, example {i + 1}: {tokens.lengths[i]:,} tokens", align="left")
            console.print(mark_trained(tokenizer, tokens[i]))
            if answers:
                console.print(f"reference answer: {reference(answers[name][i])}", markup=False)
    console.print(length_table(sources))


def mark_trained(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> Text:
    """The text of an example, what is trained of it green and, for logs without colours, in ⟦ ⟧."""
    text = Text()
    for trained, run in groupby(zip(*encoded, strict=True), key=lambda pair: pair[1]):
        words = str(tokenizer.decode([token for token, _ in run]))
        text.append(f"⟦{words}⟧" if trained else words, style="bold green" if trained else "")
    return text


def length_table(sources: Mapping[str, TokenTable]) -> Table:
    """How many examples and tokens there are, how many are trained of all, and how long the examples are.

    Of problems no token is trained before it is sampled, so they have no such column.
    """
    trains = any(tokens.answer_tokens for tokens in sources.values())
    table = Table(Column("tokens", overflow="fold"), box=None, padding=(0, 2, 0, 0))
    for column in ("examples", "in all", *(["trained"] if trains else []), "shortest", "median", "95 %", "longest"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, tokens in sources.items():
        spread = np.percentile(tokens.lengths, [0, 50, 95, 100], method="nearest")
        counts = [len(tokens), tokens.lengths.sum(), *([tokens.answer_tokens] if trains else []), *spread]
        table.add_row(name, *(f"{int(count):,}" for count in counts))
    return table
