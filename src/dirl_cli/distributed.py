"""The processes of an evaluation, and how work is split among processes."""

import heapq
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from dirl_cli.errors import DirlError

T = TypeVar("T")


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def require_whole_groups(size: int, processes: int) -> None:
    """Raises DirlError where so many processes are no multiple of those that divide a row."""
    if processes % size:
        raise DirlError(
            f"context_parallel={size} divides each row among so many processes, of which there are {processes}:"
            f" give gpus={size}, or a multiple of it"
        )


def split_by_cost(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Split pieces of work among processes so that their costs are about even.

    costs: of each piece, in any unit. Returns for each process the indices of its pieces, ascending. Greedy, after
    R. L. Graham, "Bounds on Multiprocessing Timing Anomalies" (1969): the costliest piece first, each to the process
    with least to do so far, which takes at most 4/3 of the shortest time possible.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [(0.0, process) for process in range(processes)]  # a heap
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, process = heapq.heappop(loads)
        shares[process].append(index)
        heapq.heappush(loads, (load + costs[index], process))
    return [sorted(share) for share in shares]


def is_group() -> bool:
    """Whether this process is one of several that train together."""
    import torch.distributed  # which takes seconds to import

    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def is_first_of_group() -> bool:
    """Whether this process is alone, or the first of those that train together."""
    import torch.distributed

    return not is_group() or torch.distributed.get_rank() == 0


def wait_for_group() -> None:
    """Wait until all processes that train together have come here."""
    import torch.distributed

    if is_group():
        torch.distributed.barrier()


def first_tells(value: T) -> T:
    """The value that the first of the processes that train together has. Every one of them has to call."""
    import torch.distributed

    if not is_group():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


class Processes:
    """The processes of one evaluation: this one's rank and device, and how many there are.

    count: 1 starts no process group. device: as configured, such as auto; each process of several gets its own.
    """

    def __init__(self, count: int, device: str) -> None:
        # One process neither imports torch for this nor opens a port.
        self.rank = 0
        self.count = 1
        self.device = device
        if count > 1:
            import torch  # these take seconds to import
            from accelerate import PartialState

            on_cpu = device == "cpu" or not torch.cuda.is_available()
            self.state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))  # the first to finish waits for the last
            self.rank = self.state.process_index
            self.count = self.state.num_processes
            self.device = str(self.state.device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            self.state.wait_for_everyone()
