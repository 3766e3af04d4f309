"""What an answer is worth beside the others to its problem."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_STD = 1e-4  # TRL adds as much to every spread; a floor leaves rewards of 0 and 1 exactly as they are
VARIANCE_FLOOR = 1e-8  # as verl adds to a variance
ROUNDING = 1e-6  # rewards nearer to each other than this are the same

Advantage = Callable[[Tensor], Tensor]
"""From the rewards of a group (G,) to advantages (G,)."""


def normalised(rewards: Tensor) -> Tensor:
    """(R - mean) / std, the population's; zero where all are equal (GRPO).

    A spread below 1e-4 counts as that, so that rewards which differ by rounding are not blown up to ±1.
    """
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std(correction=0).clamp(min=LEAST_STD)


def mean_only(rewards: Tensor) -> Tensor:
    """R - mean (Dr. GRPO, arXiv 2503.20783)."""
    return rewards - rewards.mean()


def softmax_contrast(rewards: Tensor) -> Tensor:
    """softmax(R - mean) - softmax(mean - R), each over the group (wd1, arXiv 2507.08838); the scale of rewards counts.

    Zero on average; of rewards of 0 and 1 the more right answers there are, the less each weighs.
    """
    centred = rewards - rewards.mean()
    return centred.softmax(0) - (-centred).softmax(0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """R - the mean of the others (RLOO, arXiv 2402.14740)."""
    n = len(rewards)
    return (rewards - rewards.mean()) * (n / (n - 1)) if n > 1 else torch.zeros_like(rewards)


def best(rewards: Tensor) -> Tensor:
    """1 for the answers of the highest reward, 0 for the others, and for all where all are equal (arXiv 2304.06767)."""
    if rewards.max() - rewards.min() <= ROUNDING:
        return torch.zeros_like(rewards)
    return (rewards >= rewards.max() - ROUNDING).to(rewards)


def nothing(rewards: Tensor) -> Tensor:
    """0 for every answer: rewards are reported, and something else is learned, such as a teacher's probabilities."""
    return torch.zeros_like(rewards)


ADVANTAGES: dict[str, Advantage] = {
    f.__name__: f for f in (normalised, mean_only, leave_one_out, softmax_contrast, best, nothing)
}
BATCH_ADVANTAGES = ("batch_normalised", "each_normalised")  # which all groups of a step are needed for


@dataclass(frozen=True)
class GroupRewards:
    """The rewards of a group of G answers. total: (G,). parts: (G, K) of K rewards before weighting. tokens: (G,)."""

    total: Tensor
    parts: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class AdvantageEstimator:
    """From the rewards of a step's groups to advantages.

    rule: one of ADVANTAGES, which look at a group, or of BATCH_ADVANTAGES, which compare all groups of the step:
    `batch_normalised` subtracts the group's mean and divides by the spread over all tokens of the step (REINFORCE++,
    arXiv 2501.03262, as in verl); `each_normalised` divides each reward by its own spread in the group before they are
    summed by weight, then the sum by the step's (TRL's normalize_then_sum).
    clip: bounds the absolute value. negative_weight: times what is below 0. reward_weights: by a reward's name.
    """

    rule: str
    clip: float
    negative_weight: float
    reward_weights: Mapping[str, float]

    @property
    def parts(self) -> list[str]:
        """The names of the rewards that are compared one by one; none where only their sum matters."""
        return list(self.reward_weights) if self.rule == "each_normalised" else []

    def __call__(self, groups: Sequence[GroupRewards]) -> list[Tensor]:
        """The advantages of each group's answers, (G,) a group."""
        if self.rule == "batch_normalised":
            advantages = whitened_by_tokens([mean_only(group.total) for group in groups], groups)
        elif self.rule == "each_normalised":
            advantages = whitened([self._sum_of_normalised(group) for group in groups])
        else:
            advantages = [ADVANTAGES[self.rule](group.total) for group in groups]

        advantages = [values.clamp(-self.clip, self.clip) for values in advantages]
        return [torch.where(values < 0, self.negative_weight * values, values) for values in advantages]

    def _sum_of_normalised(self, group: GroupRewards) -> Tensor:
        """Σ_k w_k (R_k - mean R_k) / (std R_k + 1e-4): (G,)."""
        centred = group.parts - group.parts.mean(0)
        spread = group.parts.std(0) if len(group.parts) > 1 else torch.zeros(group.parts.shape[1])
        return (centred / (spread + LEAST_STD)) @ torch.tensor(list(self.reward_weights.values()), dtype=torch.float32)


def whitened(groups: Sequence[Tensor]) -> list[Tensor]:
    """Every answer's value less the mean of all, divided by their spread."""
    if not groups:
        return []
    values = torch.cat(list(groups))
    spread = values.std() if len(values) > 1 else values.new_zeros(())
    return [(group - values.mean()) / (spread + LEAST_STD) for group in groups]


def whitened_by_tokens(advantages: Sequence[Tensor], groups: Sequence[GroupRewards]) -> list[Tensor]:
    """Every answer's value less the mean of all tokens of the step, divided by their spread."""
    if not groups:
        return []
    values = torch.cat(list(advantages))
    tokens = torch.cat([group.tokens for group in groups]).float()
    mean = (values * tokens).sum() / tokens.sum()
    variance = ((values - mean).square() * tokens).sum() / (tokens.sum() - 1).clamp(min=1)
    return [(group - mean) * (variance + VARIANCE_FLOOR).rsqrt() for group in advantages]


FILTERS = ("accuracy", "reward", "none")


def has_signal(rewards: Sequence[float], correct: Sequence[bool], rule: str) -> bool:
    """Whether a group's answers differ: by `accuracy` some are right and some wrong, by `reward` it is not constant.

    rule: one of FILTERS; `none` keeps every group.
    """
    if rule == "accuracy":
        return any(correct) and not all(correct)
    if rule == "reward":
        return max(rewards) - min(rewards) > ROUNDING
    return True
