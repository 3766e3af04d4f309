"""What a sampler does while the model learns: rest, or sample the next step's answers, one step off policy."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Event

import torch

from dirl_cli.loop.groups import Drawn, Sampled, State
from dirl_cli.rollout.sampler import Sampler


@contextmanager
def resting(sampler: Sampler) -> Iterator[None]:
    """The sampler gives its memory to the trainer meanwhile."""
    sampler.sleep()
    yield
    sampler.wake()


@contextmanager
def sampling_ahead(source: Sampled, state: State) -> Iterator[None]:
    """The first round of the step after `state`'s is sampled meanwhile, in a thread, and kept in `state`.

    The sampler must hold weights of its own, which nobody touches inside. Nothing is sampled where what is left over
    from earlier rounds will do.
    """
    if len(state.surplus) >= source.problems:
        yield
        return
    device, places, moment = source.accelerator.device, source.places(state), [state.step + 1, 0]
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))  # on which the weights were pushed
    stopped = Event()

    def sample() -> list[Drawn]:
        answers = []
        with torch.cuda.stream(stream) if stream else nullcontext():
            for drawn in source.own(places, moment):
                answers.append(drawn)
                if stopped.is_set():
                    break
        return answers

    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(sample)
        try:
            yield
        except BaseException:
            stopped.set()  # the answer that is being written is the last
            raise
        state.ahead = source.gathered(under_way.result(), places)
