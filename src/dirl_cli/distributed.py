"""Who answers what: problems to processes, so that all are done at about the same time."""

import heapq
from collections.abc import Sequence


def balanced(costs: Sequence[float], processes: int) -> list[list[int]]:
    """For each process the places of its share, in order: the costliest first, each to who has least to do so far."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    load = [(0.0, process) for process in range(processes)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least, process = heapq.heappop(load)
        shares[process].append(place)
        heapq.heappush(load, (least + costs[place], process))
    return [sorted(share) for share in shares]
