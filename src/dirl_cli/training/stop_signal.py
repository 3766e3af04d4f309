"""Ctrl-C and SIGTERM as a wish to stop, which loses nothing and is answered at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

from dirl_cli.errors import STOP_CODES, Interrupted, Stopped

HEARD = "asked to stop: what is finished is saved first; another Ctrl-C ends it at once\n"


class StopSignal:
    """Remembers that the run was asked to stop. A second Ctrl-C ends it at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = 0  # the signal, by this process
        self.agreed = 0  # by any, when all last looked; another one may come while they do
        self.raises = False

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.receive) for number in STOP_CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if first and self.accelerator.is_main_process:
            os.write(2, HEARD.encode())  # since a print may be under way
        if self.raises:
            self.raises = False
            raise Interrupted(number)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, a wish to stop raises Interrupted. Only for what waits for no other process and changes nothing."""
        if self.received:
            raise Interrupted(self.received)
        self.raises = True
        try:
            yield
        finally:
            self.raises = False

    @contextmanager
    def raising_if_alone(self) -> Iterator[None]:
        """As `raising` in a run of one process; where there are several, which wait for each other, it waits too."""
        if self.accelerator.num_processes > 1:
            yield
        else:
            with self.raising():
                yield

    def __bool__(self) -> bool:
        """Whether any process was asked; every process gets the same answer."""
        asked = torch.tensor([self.received], device=self.accelerator.device)
        self.agreed = int(self.accelerator.gather(asked).max())
        return self.agreed > 0

    def end(self, step: int, steps: int, saved: Path | None) -> Stopped:
        """What ends the run after a step of all, which is saved in a directory; step 0 has nothing to save."""
        where = f"after step {step} of {steps}, saved in {saved}" if step else "before the end of the first step"
        number = signal.Signals(self.agreed or self.received)
        return Stopped(f"stopped {where}: the same command goes on", STOP_CODES[number])
