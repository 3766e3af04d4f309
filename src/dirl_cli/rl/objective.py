"""What an RL objective is: views × advantage × ratio level × clip × normaliser × KL.

    loss = Σ_tokens w · [ -min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) + β · k(π ‖ π_ref) ] / denominator

with ρ the probability ratio against the recorded log-probs of the same tokens in the same states. The files of
conf/algo choose; each states its formula and source.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import Trace
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.ranges import NotNegative, Range
from dirl_cli.rl.advantages import ADVANTAGES

Divergence = Callable[[Tensor], Tensor]
Clip = Annotated[float, Range(at_least=0, infinite=True, remark="inf switches it off")]
NORMALIZERS = ("token", "sequence", "constant")
LARGEST_LOG_RATIO = 10.0  # nats either way, as in TraceRL's code; from 88 on exp is infinite in fp32


@dataclass(frozen=True)
class Objective:
    """An RL objective; conf/algo/ holds those that have a name.

    views: see diffusion/states.py. advantage: see advantages.py. level: of the ratio, `token`, `step` (all that one
    denoising step revealed) or `sequence` (the answer's mean). clip_low, clip_high: ε on either side of 1.
    normalizer: `token` divides by all tokens of the global batch, `sequence` takes each answer's mean and then the
    mean of answers, `constant` divides by the answers times the longest allowed. beta: weight of the divergence
    from a frozen reference, estimated as `kl` says (k1, k2, k3).

    Where the policy is still the one that sampled, every level has the same gradient; which choices make that the
    expected reward's own is told in docs/exactness.md.
    """

    name: str
    views: Any
    advantage: str
    level: str
    normalizer: str
    clip_low: Clip
    clip_high: Clip
    beta: NotNegative
    kl: str

    def __post_init__(self) -> None:
        choices = {"advantage": ADVANTAGES, "level": LEVELS, "normalizer": NORMALIZERS, "kl": KL}
        for name, names in choices.items():
            value = getattr(self, name)
            if value not in names:
                raise DirlError(f"algo.{name}={value}: {did_you_mean(value, names)}")

    @property
    def is_exact(self) -> bool:
        """Whether tokens are scored in the states that revealed them, so that the sampler's log-probs are the same."""
        return isinstance(self.views, Trace)

    def loss(self, rows: Rows, logprobs: Tensor, entropy: Tensor) -> dict[str, Tensor]:
        """Sums over the scored tokens (N,) of `rows`: the loss, and what is worth watching.

        rows.extras: `sample` (which answer a token belongs to), `length` (its answer's tokens), `advantage`,
        `old_logprobs` (without them these are taken for it, and the ratio is 1), `ref_logprobs` where beta is not 0,
        and `importance_weight` (truncated) where the sampler's probabilities were not the trainer's.
        """
        extras = rows.extras
        token_weight = self.token_weight(rows)

        # The clipped surrogate: of the two the lower, so that nothing is gained beyond the clip.
        ratio = ratio_of(at_level(self.level, logprobs - extras.get("old_logprobs", logprobs.detach()), rows))
        advantage = extras["advantage"]
        free = ratio * advantage
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage
        loss = -torch.minimum(free, clipped)
        if "importance_weight" in extras:
            loss = loss * extras["importance_weight"]

        watched = {"entropy": entropy, "ratio": ratio, "clipped": (free > clipped).float()}
        if self.beta:
            kl = KL[self.kl](at_level(self.level, extras["ref_logprobs"] - logprobs, rows))
            loss = loss + self.beta * kl
            watched["kl"] = kl

        watched = {name: (token_weight * value).detach().sum() for name, value in watched.items()}
        return {"loss": (token_weight * loss).sum(), "total_weight": token_weight.sum(), **watched}

    def token_weight(self, rows: Rows) -> Tensor:
        """What each scored token counts (N,), so that the sum divided by `denominator` is the normaliser's mean.

        It begins with `rows.weight`, what the views let a token count.
        """
        is_scored = (rows.weight > 0).float()
        if self.level == "token":
            token_weight = rows.weight
        elif self.level == "step":  # a step has one term, shared out evenly among its tokens; so has an answer
            token_weight = rows.weight / summed(is_scored, step_index(rows)).clamp(min=1)
        else:
            sample = rows.extras["sample"]
            token_weight = is_scored * rows.extras["length"] / summed(is_scored, sample).clamp(min=1)
        return token_weight / rows.extras["length"] if self.normalizer == "sequence" else token_weight

    def denominator(self, lengths: Sequence[int], longest: int) -> float:
        """The normaliser of a global batch of answers with these numbers of tokens, at most `longest` allowed."""
        denominators = {"token": sum(lengths), "sequence": len(lengths), "constant": len(lengths) * longest}
        return float(denominators[self.normalizer])


def at_level(level: str, log_ratio: Tensor, rows: Rows) -> Tensor:
    """A log-ratio for each token (N,): its own, the sum over its denoising step, or its answer's weighted mean."""
    if level == "token":
        return log_ratio
    if level == "step":
        return summed(log_ratio * (rows.weight > 0), step_index(rows))
    return summed(rows.weight * log_ratio, rows.extras["sample"]) / rows.extras["length"]


def step_index(rows: Rows) -> Tensor:
    """A number for each scored token (N,), the same for those revealed together."""
    coordinates = (rows.extras["sample"], rows.at_targets(rows.coordinates.block), rows.at_targets(rows.view))
    return torch.stack(coordinates).unique(dim=1, return_inverse=True)[1]


def summed(values: Tensor, index: Tensor) -> Tensor:
    """Each value's sum over all that share its index. (N,), (N,) to (N,)."""
    return values.new_zeros(int(index.max()) + 1).index_add(0, index, values)[index]


def ratio_of(log_ratio: Tensor) -> Tensor:
    """π/π_old of log-ratios (N,), of which those beyond ±10 nats count as ±10.

    Out there a ratio has no gradient, as in TraceRL's code. That matters for bad tokens alone, which have become e^10
    times as likely: the clip has stopped all others long before, or their gradient has vanished with the ratio.
    """
    return bounded(log_ratio).exp()


def bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def k1(log_ref_ratio: Tensor) -> Tensor:
    """-(log π_ref - log π): unbiased as an estimate of KL(π ‖ π_ref); its own gradient is zero on average."""
    return -log_ref_ratio


def k2(log_ref_ratio: Tensor) -> Tensor:
    """(log π_ref - log π)² / 2: low variance, and on policy its gradient is on average that of KL(π ‖ π_ref)."""
    return log_ref_ratio.square() / 2


def k3(log_ref_ratio: Tensor) -> Tensor:
    """π_ref/π - 1 - log(π_ref/π): unbiased as an estimate of KL(π ‖ π_ref) and never negative (Schulman, 2020).

    Its gradient is another divergence's: on policy that of KL(π_ref ‖ π), the forward one. Take k2 for the reverse.
    Beyond ±10 nats it is constant; the published code bounds the exponential alone, which turns the gradient round.
    """
    log_ref_ratio = bounded(log_ref_ratio)
    return log_ref_ratio.exp() - 1 - log_ref_ratio


LEVELS = ("token", "step", "sequence")
KL: dict[str, Divergence] = {f.__name__: f for f in (k1, k2, k3)}
