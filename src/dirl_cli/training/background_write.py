"""A thread that writes one thing while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self

P = ParamSpec("P")


class BackgroundWrite:
    """At most one write under way; the next one, or the end of the context, waits for it and raises what it raised."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self.pending:
            self.pending.exception()  # it is written to its end, but what is reported is why the run ended

    def start(self, write: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `write` in a thread, after the last write has ended."""
        self.wait()
        thread = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self.pending = thread.submit(write, *args, **kwargs)
        thread.shutdown(wait=False)  # which ends it with what it writes

    def wait(self) -> None:
        """Wait until the last write is on the disk; raises what it raised."""
        pending = self.pending
        self.pending = None
        if pending:
            pending.result()
