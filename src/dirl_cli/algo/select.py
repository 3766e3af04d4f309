"""Which groups a policy learns from (dynamic sampling, DAPO, arXiv 2503.14476)."""

from collections.abc import Sequence

FILTERS = ("accuracy", "reward", "none")
ROUNDING = 1e-6  # rewards nearer to each other than this are the same


def has_signal(rewards: Sequence[float], correct: Sequence[bool], rule: str) -> bool:
    """Whether a group's answers differ: by `accuracy` some are right and some wrong, by `reward` it is not constant.

    rule: one of FILTERS; `none` keeps every group.
    """
    if rule == "accuracy":
        return any(correct) and not all(correct)
    if rule == "reward":
        return max(rewards) - min(rewards) > ROUNDING
    return True
