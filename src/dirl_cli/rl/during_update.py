"""What the sampler does while the policy is updated: give up its memory, or prefetch the next step's answers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Event

import torch

from dirl_cli.rl.rollouts import Indexed, RolloutSource, SampledRollouts
from dirl_cli.rollout.sampler import Sampler


def sampler_during_update(
    rollouts: RolloutSource, sampler: Sampler, step: int, is_last: bool
) -> AbstractContextManager[None]:
    """What the sampler does while the policy is updated at step `step` (from 0): it rests, or prefetches."""
    if isinstance(rollouts, SampledRollouts) and rollouts.prefetches and not is_last:
        return prefetch_rollout(rollouts, step + 1)
    return offloaded(sampler)


@contextmanager
def offloaded(sampler: Sampler) -> Iterator[None]:
    """The sampler gives its memory to the trainer meanwhile."""
    sampler.sleep()
    yield
    sampler.wake()


@contextmanager
def prefetch_rollout(rollouts: SampledRollouts, step: int) -> Iterator[None]:
    """The first round of step `step` is sampled meanwhile, in a thread, and kept in the rollouts' state.

    The sampler must hold weights of its own, which nobody touches inside. Nothing is sampled where what is left over
    from earlier rounds will do.
    """
    state = rollouts.state
    if len(rollouts.surplus(step)) >= rollouts.problems_per_step:
        yield
        return

    indices, _ = rollouts.next_indices(state.drawn, state.rests_until)
    device = rollouts.accelerator.device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))  # on which the weights were pushed
    stopped = Event()

    def sample() -> list[Indexed]:
        answers = []
        with torch.cuda.stream(stream) if stream else nullcontext():
            for answer in rollouts.sample_share(indices, step, round_number=0):
                answers.append(answer)
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
        state.prefetched = rollouts.gather(under_way.result(), indices)
