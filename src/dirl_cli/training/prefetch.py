"""What a step learns from, made by a thread while the step before is learned from."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from dirl_cli.training.background_write import in_thread

T = TypeVar("T")


class Prefetched(Generic[T]):
    """What `make` gives for each step that is asked for; the next one's is begun at once.

    make: from the step's number, from 0, on which alone it depends. steps: how many there are. enabled: else all is
    made when it is asked for. What `make` raises is raised at its step.
    """

    def __init__(self, make: Callable[[int], T], steps: int, enabled: bool = True) -> None:
        self.make = make
        self.steps = steps
        self.enabled = enabled
        self.begun: dict[int, Future[T]] = {}

    def __getitem__(self, step: int) -> T:
        begun = self.begun.pop(step, None)
        made = begun.result() if begun else self.make(step)
        if self.enabled and step + 1 < self.steps:
            self.begun[step + 1] = in_thread("prefetch", self.make, step + 1)
        return made
