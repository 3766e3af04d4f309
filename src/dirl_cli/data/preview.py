"""Show examples as a model would see them, with their trained tokens marked, and how long all of them are."""

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

    answers: where the examples are problems, the reference answers of each source, in its order.
    """
    for name, tokens in sources.items():
        for i in range(min(SHOWN, len(tokens))):
            console.rule(f"{name}, example {i + 1}: {tokens.lengths[i]:,} tokens", align="left")
            console.print(mark_trained(tokenizer, tokens[i]))
            if answers:
                console.print(f"reference answer: {reference(answers[name][i])}", markup=False)
    console.print(length_table(sources))


def mark_trained(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> Text:
    """The text of an example; trained tokens are green and, for logs without colours, in ⟦ ⟧."""
    text = Text()
    for is_trained, pairs in groupby(zip(*encoded, strict=True), key=lambda pair: pair[1]):
        words = str(tokenizer.decode([token for token, _ in pairs]))
        if is_trained:
            text.append(f"⟦{words}⟧", style="bold green")
        else:
            text.append(words)
    return text


def length_table(sources: Mapping[str, TokenTable]) -> Table:
    """How many examples and tokens there are, how many of them are trained, and how long the examples are.

    No token of a problem is trained before it is sampled, so a table of problems has no such column.
    """
    columns = ["examples", "in all", "shortest", "median", "95 %", "longest"]
    has_trained = any(tokens.answer_tokens for tokens in sources.values())
    if has_trained:
        columns.insert(2, "trained")
    # A source's name may be a long path: it alone is broken where the terminal is narrow.
    table = Table(Column("tokens", overflow="fold"), box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)

    for name, tokens in sources.items():
        quantiles = np.percentile(tokens.lengths, [0, 50, 95, 100], method="nearest")
        counts = [len(tokens), tokens.lengths.sum(), *quantiles]
        if has_trained:
            counts.insert(2, tokens.answer_tokens)
        cells = [f"{int(count):,}" for count in counts]
        table.add_row(name, *cells)
    return table
