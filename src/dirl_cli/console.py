"""A terminal that takes text for text, whoever wrote it."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from threading import Event, Thread
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from dirl_cli.text import escape_controls

SPIN, PATIENCE = 1.0, 10.0  # seconds without a sign of life, in a terminal and elsewhere


class PlainConsole(Console):
    """A rich console without markup and emoji codes, which shows control characters instead of sending them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escape_controls(segment.text))


def replace_unencodable(*streams: IO[str]) -> None:
    """Let a stream that cannot show a character show `?`, instead of ending the run."""
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def working(console: Console, what: str, total: int = 0) -> Iterator[Callable[..., None]]:
    """Show that something lives: a spinner in a terminal, elsewhere a line after ten seconds, then ever more rarely.

    Yields a function that is to be told how many of `total` are done, and whether a line was just printed that says so.
    """
    began, done, over = time.perf_counter(), 0, Event()
    status = console.status(what) if console.is_terminal else None
    due = began + (SPIN if status else PATIENCE)

    def count(now: int, printed: bool = False) -> None:
        nonlocal done, due
        done = now
        if printed:
            due = time.perf_counter() + PATIENCE

    def tell() -> None:
        nonlocal due
        while not over.wait(max(0.0, due - time.perf_counter())):
            elapsed = time.perf_counter() - began
            if time.perf_counter() < due:  # there was a line meanwhile
                continue
            progress = f" · {done:,} of {total:,}" if total else ""
            text = f"{what}{progress} · {round(elapsed) // 60}:{round(elapsed) % 60:02} so far"
            if status:
                status.update(text)
                status.start()
                due += SPIN
            else:
                console.print(text, soft_wrap=True)
                due += max(PATIENCE, elapsed / 2)

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield count
    finally:
        over.set()
        teller.join()
        if status:
            status.stop()
