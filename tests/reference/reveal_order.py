"""The states of sampled answers block by block and token by token, in plain Python, as the published code has them.

A block is a list of the forwards that revealed its tokens, a state the tokens hidden in it and those that count.
"""

from collections.abc import Sequence


def windows_of(revealed_at: Sequence[int], window: int) -> list[list[int]]:
    """The block's tokens by window: dLLM-RL's `collapse_k_unique`, in which k successive steps are one."""
    steps = sorted(set(revealed_at))
    groups = []
    for first in range(0, len(steps), window):
        merged = steps[first : first + window]
        groups.append([i for i, step in enumerate(revealed_at) if step in merged])
    return groups


def states_of(revealed_at: Sequence[int], window: int) -> list[tuple[set[int], set[int]]]:
    """What is hidden and what counts in each round of dLLM-RL: the earliest group left, and all that is left."""
    left = windows_of(revealed_at, window)
    states = []
    while left:
        hidden = {i for group in left for i in group}
        states.append((hidden, set(left[0])))
        left = left[1:]
    return states


def chances(revealed_at: Sequence[int], window: int, exponent: float) -> list[float]:
    """T3D's chance of each state: the share that is hidden to the power of the exponent, over the sum of all."""
    shares = [len(hidden) / len(revealed_at) for hidden, _ in states_of(revealed_at, window)]
    return [share**exponent / sum(other**exponent for other in shares) for share in shares]


def path_loss(losses: Sequence[float], groups: Sequence[Sequence[int]]) -> float:
    """T3D's path loss: at each level the mean over all tokens revealed so far, then the mean over levels."""
    levels = []
    for level in range(len(groups)):
        so_far = [losses[i] for group in groups[: level + 1] for i in group]
        levels.append(sum(so_far) / len(so_far))
    return sum(levels) / len(levels)
