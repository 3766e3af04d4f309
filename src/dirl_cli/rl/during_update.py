"""What the sampler does while the policy is updated: give up its memory, or sample answers ahead."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Event

import torch

from dirl_cli.rl.rollout_state import RolloutSource
from dirl_cli.rl.rollouts import SampledRollouts
from dirl_cli.rl.rounds import Outcome
from dirl_cli.rollout.sampler import Sampler


def sampler_during_update(
    rollouts: RolloutSource, sampler: Sampler, step: int, steps: int
) -> AbstractContextManager[None]:
    """What the sampler does while the policy is updated at step `step` (from 0) of `steps`: it rests, or prefetches."""
    if isinstance(rollouts, SampledRollouts):
        most = min(rollouts.rounds_ahead, steps - step - 1)
        if most:
            return prefetch_rollout(rollouts, step + 1, most)
    return offloaded(sampler)


@contextmanager
def offloaded(sampler: Sampler) -> Iterator[None]:
    """The sampler gives its memory to the trainer meanwhile."""
    sampler.sleep()
    yield
    sampler.wake()


@contextmanager
def prefetch_rollout(rollouts: SampledRollouts, step: int, most: int) -> Iterator[None]:
    """The round of step `step` (from 0) and those of later ones, `most` together, are sampled meanwhile, in a thread.

    They are kept in the rollouts' state. The first is waited for at the end, and half as many answers to others: so
    how far each has come is decided by what was sampled and not by the clock, and the same again after a resume. The
    sampler must hold weights of its own, which nobody touches inside. Nothing is sampled where what is left over from
    earlier rounds will do.
    """
    state = rollouts.state
    if len(rollouts.surplus(step)) >= rollouts.problems_per_step:
        yield
        return

    rounds = rollouts.draw_ahead(step, most)
    more = rollouts.half_of_next(rounds)
    device = rollouts.accelerator.device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))  # on which the weights were pushed
    stopped = Event()

    def sample() -> list[Outcome]:
        outcomes = []
        with torch.cuda.stream(stream) if stream else nullcontext():
            for outcome in rollouts.sample_share(rounds, more):
                outcomes.append(outcome)
                if stopped.is_set():
                    break
        return outcomes

    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(sample)
        try:
            yield
        except BaseException:
            stopped.set()  # the answer that is being written is the last
            raise
        state.rounds = rollouts.gather(under_way.result(), rounds)
