"""What a step learns from, where it comes from, and how far into its problems a run is."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from dirl_cli.rl.groups import Group, groups_from_json, groups_to_json
from dirl_cli.rl.rounds import Round


@dataclass
class RolloutState:
    """How far into the endless order of problems a run is, which its checkpoints keep.

    drawn: problems drawn so far, for rounds that a step has taken. surplus: groups left over for the next step. rounds:
    those that are sampled ahead, the next one first. rests_until: see curriculum.py. lengths: by problem, the mean of
    its last answers in tokens, by which processes share the work: what each leaves under way depends on that.
    """

    drawn: int = 0
    surplus: list[Group] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    rests_until: dict[int, int] = field(default_factory=dict)
    lengths: dict[int, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "drawn": self.drawn,
            "surplus": groups_to_json(self.surplus),
            "rounds": [one.to_json() for one in self.rounds],
            "rests_until": {str(problem): index for problem, index in self.rests_until.items()},
            "lengths": {str(problem): tokens for problem, tokens in self.lengths.items()},
        }

    @staticmethod
    def from_json(saved: dict[str, Any]) -> "RolloutState":
        rests_until = {int(problem): index for problem, index in saved.get("rests_until", {}).items()}
        rounds = [Round.from_json(one) for one in saved.get("rounds", [])]  # earlier versions' are sampled anew
        lengths = {int(problem): tokens for problem, tokens in saved.get("lengths", {}).items()}
        return RolloutState(saved["drawn"], groups_from_json(saved["surplus"]), rounds, rests_until, lengths)


@dataclass(frozen=True)
class Rollout:
    """What a step has to learn from.

    groups: those it learns from, what earlier steps left over first. sampled: all that were sampled for it, as they
    were before hints. num_with_signal: how many of them passed the filter, be it for a later step. hinted: what was
    sampled again with hints, a group for each that was all wrong; None where that is not done. too_stale: groups with a
    signal that were dropped, since their answers are of weights that are too old.
    """

    groups: list[Group]
    sampled: list[Group]
    num_with_signal: int
    hinted: list[Group] | None = None
    too_stale: int = 0


class RolloutSource(Protocol):
    """Where a step's groups come from."""

    state: RolloutState

    @property
    def answers_per_problem(self) -> int:
        """How many there should be; 0 where that is not known."""
        ...

    @property
    def is_new(self) -> bool:
        """Whether the answers or their rewards are on no disk yet."""
        ...

    def collect(self, step: int) -> Rollout:
        """The rollout of step `step` (from 0); moves `state` on.

        Where it is interrupted, `state` is what it was.
        """
        ...

    def epochs(self) -> dict[str, float]:
        """How often each source of problems has been gone through, as metrics."""
        ...
