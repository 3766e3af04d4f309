"""The processes of a command, and who of them does what."""

import heapq
from collections.abc import Sequence
from datetime import timedelta


def split_by_cost(costs: Sequence[float], processes: int) -> list[list[int]]:
    """For each process the places of its share, in order: the costliest first, each to who has least to do so far."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    load = [(0.0, process) for process in range(processes)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least, process = heapq.heappop(load)
        shares[process].append(place)
        heapq.heappush(load, (least + costs[place], process))
    return [sorted(share) for share in shares]


class Processes:
    """The processes of one evaluation: this one's rank and device, and how many there are."""

    def __init__(self, count: int, device: str) -> None:
        self.rank, self.count, self.device = 0, 1, device
        if count > 1:
            import torch  # these take seconds to import
            from accelerate import PartialState

            on_cpu = device == "cpu" or not torch.cuda.is_available()
            self.state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))  # the first to finish waits for the last
            self.rank, self.count = self.state.process_index, self.state.num_processes
            self.device = str(self.state.device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.count > 1:
            self.state.wait_for_everyone()
