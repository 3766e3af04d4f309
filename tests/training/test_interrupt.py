"""The wish to stop: heard once, by all processes alike, and answered at once where one is alone."""

import os
import signal

import pytest
from torch import Tensor

from dirl_cli.errors import Interrupted
from dirl_cli.training.stop_signal import StopSignal


class Alone:
    """The only process, to which a signal comes while it asks the others."""

    device = "cpu"
    is_main_process = True
    num_processes = 1

    def __init__(self, number: int) -> None:
        self.number = number

    def gather(self, asked: Tensor) -> Tensor:
        os.kill(os.getpid(), self.number)
        return asked


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_that_comes_while_processes_agree_is_heard_the_next_time(number, code, capfd):
    with StopSignal(Alone(number)) as stop:
        assert not stop
        stop.accelerator.gather = lambda asked: asked
        assert stop
        stopped = stop.end(3, 5, "run/step-3")
    sentence = "stopped after step 3 of 5, saved in run/step-3: the same command goes on"
    assert (str(stopped), stopped.exit_code) == (sentence, code)
    assert capfd.readouterr().err.startswith("asked to stop: what is finished is saved first")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_one_process_does_alone_is_given_up_at_once(number, capfd):
    reached = []
    with StopSignal(Alone(number)) as stop:
        with pytest.raises(Interrupted), stop.raising_if_alone():
            os.kill(os.getpid(), number)
            reached.append("the end")
        with pytest.raises(Interrupted), stop.raising():  # nor is anything else begun
            reached.append("the next")
        assert str(stop.end(0, 5, None)).startswith("stopped before the end of the first step")
    assert reached == []
    assert capfd.readouterr().err.count("asked to stop") == 1


def test_what_several_processes_do_together_is_finished():
    reached = []
    with StopSignal(Alone(signal.SIGTERM)) as stop:
        stop.accelerator.num_processes = 2
        with stop.raising_if_alone():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("the end")
        assert stop.received == signal.SIGTERM
    assert reached == ["the end"]
