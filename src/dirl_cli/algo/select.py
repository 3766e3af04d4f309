"""Which groups a policy learns from (dynamic sampling, DAPO, arXiv 2503.14476)."""

from collections.abc import Sequence

from dirl_cli.errors import DirlError, did_you_mean

FILTERS = ("accuracy", "reward", "none")


def has_signal(rewards: Sequence[float], correct: Sequence[bool], rule: str) -> bool:
    """Whether a group's answers differ: by `accuracy` some are right and some wrong, by `reward` it is not constant."""
    if rule == "none":
        return True
    if rule == "accuracy":
        return any(correct) and not all(correct)
    if rule == "reward":
        return len(set(rewards)) > 1
    raise DirlError(f"rl.filter={rule}: {did_you_mean(rule, FILTERS)}")
