"""An engine as HTTP sees it, whether it is a thread (engine_thread.py) or a process (engine_process.py)."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.sampler import GivenUp, NewBlock
from dirl_cli.types import Decoding

STOPPING = "the server is stopping: ask again when it is back"
ASLEEP = "the server is asleep: POST /wake first"
FAILED = "the engine has failed: start it again"

ReadWeights = Callable[[DiffusionLM], dict[str, Tensor]]
"""Gives weights by name for the model that is served."""


@dataclass(frozen=True)
class OtherWeights(GivenUp):
    """An answer that was asked for of weights which are not those that answer."""


@dataclass(eq=False)
class Query:
    """Several answers to a prompt that somebody waits for.

    samples: their indices, which decide their randomness together with decoding.seed. deliver: called in a thread of
    the engine's with whatever becomes of them. weights: that it is asked of; None for whichever there are. answer_ids:
    blocks that the one answer has already.
    """

    prompt_ids: list[int]
    samples: range
    decoding: Decoding
    deliver: Callable[[NewBlock | GivenUp], None]
    weights: WeightsId | None = None
    answer_ids: Sequence[int] = ()
    number: int = -1  # the engine's, of its prompt


@dataclass(frozen=True)
class EngineState:
    """How an engine is. weights: that answer now. forwards: its steps so far. running, waiting: numbers of answers."""

    weights: WeightsId
    is_asleep: bool = False
    forwards: int = 0
    running: int = 0
    waiting: int = 0


class Engine(Protocol):
    """Answers queries; all may be called from any thread.

    ended: done when it is over, with the error that ended it. end: why nothing comes any more then.
    """

    ended: Future[None]
    end: str

    @property
    def state(self) -> EngineState: ...

    def submit(self, query: Query) -> None:
        """Answer a query as soon as there is room."""
        ...

    def withdraw(self, query: Query, samples: Iterable[int]) -> None:
        """Forget some answers of a query; what was computed of them may still be delivered."""
        ...

    def refuse_waiting(self) -> None:
        """Give back what has not begun."""
        ...

    def drop_running(self) -> None:
        """Give back what has not ended."""
        ...

    def sleep(self) -> Future[None]:
        """Give the device's memory back once nothing is under way; what waits then, or comes, is given back."""
        ...

    def wake(self) -> Future[None]:
        """Go on after `sleep`."""
        ...

    def update_weights(self, read: ReadWeights, version: int | None, sha256: str | None = None) -> Future[int]:
        """Answer with other weights once nothing is under way; the future holds their version.

        read: is called where the engine is, but not where these are the weights already, as their version and sha256
        tell. version: None for the next one. A DirlError of `read` is the future's, and the weights stay as they are.
        """
        ...

    def stop(self) -> None:
        """End after the current step; whatever waits or runs is given back."""
        ...


def other_weights(asked: WeightsId | None, weights: WeightsId) -> str | None:
    """Why what is asked of some weights is not answered while others answer; None where it is."""
    if asked is None or asked == weights:
        return None
    return f"asked of version {asked.version}, and other weights answer, of version {weights.version}"
