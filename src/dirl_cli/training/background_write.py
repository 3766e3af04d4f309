"""What a thread does while training goes on: a call of its own, or one write after another."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(name: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call `work` in a thread of this name, which ends with it."""
    thread = ThreadPoolExecutor(1, thread_name_prefix=name)
    future = thread.submit(work, *args, **kwargs)
    thread.shutdown(wait=False)
    return future


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
        self.pending = in_thread(self.name, write, *args, **kwargs)

    def wait(self) -> None:
        """Wait until the last write is on the disk; raises what it raised."""
        pending = self.pending
        self.pending = None
        if pending:
            pending.result()
