"""A rich console that escapes control characters and markup, and a sign of life for what takes long."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from threading import Event, Thread
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from dirl_cli.text import escape_controls

# Seconds without a sign of life, in a terminal and elsewhere.
SPIN = 1.0
PATIENCE = 10.0


class PlainConsole(Console):
    """A rich console without markup and emoji codes, which shows control characters instead of sending them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:  # rich's own, which moves the cursor of a live display
                yield segment
            else:
                yield segment._replace(text=escape_controls(segment.text))


def replace_unencodable(*streams: IO[str]) -> None:
    """Make streams show `?` for a character that they cannot encode, instead of ending the run."""
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def working(console: Console, what: str, total: int = 0) -> Iterator[Callable[..., None]]:
    """Show that the block goes on: a spinner in a terminal, elsewhere a line after ten seconds, then ever more rarely.

    what: goes on, such as `loading the model`. total: units of work, 0 where they are not counted.
    Yields a function `count(done, printed)`: how many of `total` are done, and whether the caller just printed a line
    that says so.
    """
    # Most of what is shown ends sooner than a sign of life is due, and then leaves nothing on the screen.
    began = time.perf_counter()
    done = 0
    over = Event()
    status = console.status(what) if console.is_terminal else None
    due = began + (SPIN if status else PATIENCE)  # when to show the next sign of life

    def count(now: int, printed: bool = False) -> None:
        nonlocal done, due
        done = now
        if printed:
            due = time.perf_counter() + PATIENCE

    def show_signs() -> None:
        nonlocal due
        while not over.wait(max(0.0, due - time.perf_counter())):
            elapsed = time.perf_counter() - began
            if time.perf_counter() < due:  # the caller printed a line meanwhile
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

    # A thread, since the block is busy; a daemon, so that it never keeps the process from ending.
    thread = Thread(target=show_signs, daemon=True)
    thread.start()
    try:
        yield count
    finally:
        over.set()
        thread.join()
        if status:
            status.stop()
