"""The wish to stop: heard once, by all processes alike."""

import os
import signal

import pytest
from torch import Tensor

from dirl_cli.training.interrupt import StopSignal


class Alone:
    """The only process, to which a signal comes while it asks the others."""

    device = "cpu"

    def __init__(self, number: int) -> None:
        self.number = number

    def gather(self, asked: Tensor) -> Tensor:
        os.kill(os.getpid(), self.number)
        return asked


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_that_comes_while_processes_agree_is_heard_the_next_time(number, code):
    with StopSignal(Alone(number)) as stop:
        assert not stop
        stop.accelerator.gather = lambda asked: asked
        assert stop
        stopped = stop.end("after step 3 of 5")
    assert (str(stopped), stopped.exit_code) == ("stopped after step 3 of 5: the same command goes on", code)
