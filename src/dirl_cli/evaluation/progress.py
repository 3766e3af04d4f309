"""What an evaluation shows while it goes: a live line in a terminal, ten plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dirl_cli.console import working
from dirl_cli.evaluation.answers import Answer


def tracked(
    answers: Iterable[Answer], known: Iterable[Answer], total: int, console: Console, processes: int = 1
) -> Iterator[Answer]:
    """The answers, with accuracy so far (`known` ones included), tokens/s and time left shown as they pass.

    total: of this one of `processes`, which is told where it is not the only one.
    """
    whose = f" · process 1 of {processes}" if processes > 1 else ""
    columns = [BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}")]
    columns += [TimeRemainingColumn(compact=True), TextColumn("left")]
    live = console.is_terminal and not console.quiet
    known = list(known)
    done, right, tokens, started = len(known), sum(answer.correct for answer in known), 0, time.perf_counter()
    bar = Progress(*columns, console=console, transient=True, disable=not live)
    with bar, nullcontext(lambda done, printed: None) if live else working(console, "answering", total) as count:
        task = bar.add_task("", total=total, completed=done)
        for answer in answers:
            done, right, tokens = done + 1, right + answer.correct, tokens + answer.tokens
            seconds = time.perf_counter() - started
            speed = f"{tokens / seconds:,.0f} tokens/s" if tokens else f"{done / seconds:,.0f} answers/s"
            text = f"accuracy {100 * right / done:.1f} · {speed}{whose}"
            bar.update(task, completed=done, description=text)
            a_tenth = not live and 10 * done // total > 10 * (done - 1) // total
            count(done, printed=a_tenth)
            if a_tenth:
                console.print(f"{done}/{total} answers · {text}", markup=False, highlight=False)
            yield answer
