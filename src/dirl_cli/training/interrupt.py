"""Ctrl-C and SIGTERM as a wish to stop after the step that is under way."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator

from dirl_cli.errors import Stopped

# A scheduler that sent SIGTERM is told that nothing is lost, a shell that Ctrl-C ended the command.
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


class StopSignal:
    """Remembers that the run was asked to stop. A second Ctrl-C ends it at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = 0  # the signal, by this process
        self.agreed = 0  # by any, when all last looked; another one may come while they do

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.receive) for number in EXIT_CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self) -> bool:
        """Whether any process was asked; every process gets the same answer."""
        asked = torch.tensor([self.received], device=self.accelerator.device)
        self.agreed = int(self.accelerator.gather(asked).max())
        return self.agreed > 0

    def end(self, where: str) -> Stopped:
        """What ends the run. where: such as `after step 3 of 5`."""
        return Stopped(f"stopped {where}: the same command goes on", EXIT_CODES[signal.Signals(self.agreed)])
