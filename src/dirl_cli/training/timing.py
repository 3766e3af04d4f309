"""Where the time of a run goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimes:
    """Seconds spent in named phases: `total` since the start, and what `take` gives since it was last called.

    A run takes them with each line of its metrics, which so holds what came since the line before it.
    """

    def __init__(self) -> None:
        self.total: dict[str, float] = defaultdict(float)
        self._new: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.total[phase] += seconds
            self._new[phase] += seconds

    def take(self) -> dict[str, float]:
        """As metrics, such as `seconds/optimizer`."""
        new, self._new = self._new, defaultdict(float)
        return {f"seconds/{phase}": seconds for phase, seconds in new.items()}
