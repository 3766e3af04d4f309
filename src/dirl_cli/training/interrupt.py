"""Ctrl-C and SIGTERM as a wish to stop after the step that is under way."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator


class StopSignal:
    """Remembers that the run was asked to stop. A second Ctrl-C ends it at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = False

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self) -> bool:
        """Whether any process was asked; every process gets the same answer."""
        if self.accelerator.num_processes == 1:
            return self.received
        asked = torch.tensor(float(self.received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)
