"""What an RL objective is: views × advantage × ratio level × surrogate × normaliser × KL.

    loss = Σ_tokens w · [ surrogate(ρ, A) + β · k(π ‖ π_ref) - c · entropy ] / denominator

with ρ the probability ratio against the recorded log-probs of the same tokens in the same states, and the surrogate
-min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) unless an objective says otherwise. The files of conf/algo choose; each
states its formula and source.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from torch import Tensor

from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import SampledTrace, Trace
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.ranges import Natural, NotNegative, Positive, Range, Share
from dirl_cli.rl.advantages import ADVANTAGES, BATCH_ADVANTAGES, AdvantageEstimator
from dirl_cli.rl.evidence_bounds import bound_score
from dirl_cli.rl.units import LEVELS, at_level, bounded, ratio_of, token_weights

Divergence = Callable[[Tensor], Tensor]
Clip = Annotated[float, Range(at_least=0, infinite=True, remark="inf switches it off")]
Cap = Annotated[float, Range(above=0, infinite=True, remark="inf switches it off")]
NORMALIZERS = ("token", "sequence", "constant")
SELF = "self"  # the teacher that is the reference
SURROGATES = ("clipped", "linear", "likelihood", "bounds")


@dataclass(frozen=True)
class Objective:
    """An RL objective; conf/algo/ holds those that have a name.

    views: see diffusion/states.py. advantage: see advantages.py. level: of the ratio, see units.py.
    surrogate: `clipped` is PPO's; `linear` clips 1 + log ρ in place of ρ where the advantage is positive (BGPO);
    `likelihood` is -A log p without a ratio; `bounds` puts bounds of log p from below and above in its place (SPG).
    clip_low, clip_high: ε on either side of 1. dual_clip: the loss of a bad answer is at most this times -A.
    normalizer: `token` divides by all tokens of the global batch, `sequence` takes each answer's mean and then the
    mean of answers, `constant` divides by the answers times the longest allowed. beta: weight of the divergence
    from a reference, estimated as `kl` says (k1, k2, k3). reference_every: optimizer steps after which the reference
    moves by `reference_rate` towards the policy; 0 leaves it what the policy began as. teacher: the path of another
    model of the same tokens that is the reference instead, or `self` for the reference. teacher_prompt: what it reads
    in the place of the question, see teacher.py.
    self_normalised: answers are weighted by the softmax of their log-ratios in their group (StableDRL).
    advantage_clip: bounds |A|. negative_weight: times the advantages below 0. entropy_bonus: c, per nat.
    mask_overlong: nothing is learned from answers that did not stop, whose rewards still count in their group.
    upper_power, upper_share: of `bounds` alone, see evidence_bounds.py.

    Where the policy is still the one that sampled, every level has the same gradient; which choices make that the
    expected reward's own is told in docs/exactness.md.
    """

    name: str
    views: Any
    advantage: str
    level: str
    surrogate: str
    normalizer: str
    clip_low: Clip
    clip_high: Clip
    dual_clip: Cap
    beta: NotNegative
    kl: str
    reference_every: Natural
    reference_rate: Share
    teacher: str | None
    teacher_prompt: str | None
    self_normalised: bool
    advantage_clip: Cap
    negative_weight: NotNegative
    entropy_bonus: NotNegative
    mask_overlong: bool
    upper_power: Positive | None = None
    upper_share: Share | None = None

    def __post_init__(self) -> None:
        choices = {
            "advantage": (*ADVANTAGES, *BATCH_ADVANTAGES),
            "level": LEVELS,
            "surrogate": SURROGATES,
            "normalizer": NORMALIZERS,
            "kl": KL,
        }
        for name, names in choices.items():
            value = getattr(self, name)
            if value not in names:
                raise DirlError(f"algo.{name}={value}: {did_you_mean(value, names)}")
        if self.teacher and not self.beta:
            raise DirlError("algo.teacher is what algo.beta above 0 stays near: give algo.beta=1, or leave it out")
        if self.other_teacher and self.reference_every:
            raise DirlError("algo.teacher stays as it is, and algo.reference_every moves the reference: leave one out")
        if self.teacher == SELF and not self.teacher_prompt:
            raise DirlError("algo.teacher=self reads algo.teacher_prompt: give one that names {question} and {answer}")
        if self.teacher_prompt and not self.teacher:
            raise DirlError("algo.teacher_prompt is for a teacher to read: give algo.teacher, such as self")
        if self.teacher_prompt and "{question}" not in self.teacher_prompt:
            raise DirlError("algo.teacher_prompt stands in the place of the question: name {question} in it")
        self.require_read()
        if self.surrogate == "bounds" and self.level != "sequence":
            raise DirlError("algo.surrogate=bounds bounds the log-prob of an answer: give algo.level=sequence")

    def require_read(self) -> None:
        """Raises DirlError for a setting that the surrogate does not read, or for one that it lacks."""
        for name in ("clip_low", "clip_high", "dual_clip"):
            value = getattr(self, name)
            is_cap = name == "clip_high" and self.self_normalised  # of the ratios that weigh answers
            if value < torch.inf and not self.has_ratio and not is_cap:
                raise DirlError(
                    f"algo.{name}={value:g} clips a ratio, and algo.surrogate={self.surrogate} takes none: give"
                    f" algo.{name}=inf"
                )
        for name in ("upper_power", "upper_share"):
            is_there = getattr(self, name) is not None
            if is_there and self.surrogate != "bounds":
                raise DirlError(f"algo.{name} is of algo.surrogate=bounds: leave it out, or give that")
            if not is_there and self.surrogate == "bounds":
                raise DirlError("algo.surrogate=bounds wants +algo.upper_power=1.5 +algo.upper_share=0.5")

    @property
    def has_ratio(self) -> bool:
        """Whether the loss has the ratio to the policy that sampled in it."""
        return self.surrogate in ("clipped", "linear")

    @property
    def is_exact(self) -> bool:
        """Whether tokens are scored in the states that revealed them, so that the sampler's log-probs are the same."""
        return isinstance(self.views, Trace | SampledTrace)

    @property
    def other_teacher(self) -> str | None:
        """The path of a teacher that is another model than the reference."""
        return None if self.teacher == SELF else self.teacher

    @property
    def passes_over(self) -> bool:
        """Whether nothing is to be learned from answers of advantage 0, which then need not be laid out."""
        has_more_terms = self.beta > 0 or self.entropy_bonus > 0 or self.self_normalised
        return self.advantage == "best" and self.surrogate == "likelihood" and not has_more_terms

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the policy that sampled enters the loss once the present one has moved on from it."""
        return self.has_ratio or self.self_normalised

    def loss(self, rows: Rows, logprobs: Tensor, entropy: Tensor, *_: Tensor) -> dict[str, Tensor]:
        """Sums over the scored tokens (N,) of `rows`: the loss, and what is worth watching.

        rows.extras: `sample` (which answer a token belongs to), `length` (its answer's tokens), `advantage`,
        `old_logprobs` (without them these are taken for it, and the ratio is 1), `ref_logprobs` where beta is not 0,
        `importance_weight` and `is_cut` where the sampler's probabilities were not the trainer's, and `answer_weight`
        where answers are weighted in their group.
        """
        extras = rows.extras
        advantage = extras["advantage"]
        watched = {"entropy": entropy}

        if self.surrogate == "likelihood":
            loss = -advantage * at_level(self.level, logprobs, rows)
        elif self.surrogate == "bounds":
            power = cast(float, self.upper_power)  # both are given where bounds are learned from
            loss = -advantage * bound_score(rows, logprobs, power, cast(float, self.upper_share))
        else:
            log_ratio = at_level(self.level, logprobs - extras.get("old_logprobs", logprobs.detach()), rows)
            ratio = ratio_of(log_ratio)
            if self.surrogate == "linear":
                ratio = torch.where(advantage > 0, 1 + bounded(log_ratio), ratio)
            loss, is_clipped = self.clipped_loss(ratio, advantage)
            watched |= {"ratio": ratio, "clipped": is_clipped.float()}

        if "answer_weight" in extras:
            loss = loss * extras["answer_weight"]
        if "importance_weight" in extras:
            importance = extras["importance_weight"]
            loss = loss * importance
            watched |= {"correction": importance, "correction_square": importance**2}
            watched["correction_cut"] = extras["is_cut"]
        if self.beta:
            kl = KL[self.kl](at_level(self.level, extras["ref_logprobs"] - logprobs, rows))
            loss = loss + self.beta * kl
            watched["kl"] = kl
        if self.entropy_bonus:
            loss = loss - self.entropy_bonus * entropy

        token_weight = token_weights(self.level, rows)
        if self.normalizer == "sequence":
            token_weight = token_weight / extras["length"]
        sums = {name: (token_weight * value).detach().sum() for name, value in watched.items()}
        return {"loss": (token_weight * loss).sum(), "total_weight": token_weight.sum(), **sums}

    def clipped_loss(self, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """-min(ρ A, clip(ρ) A), of bad answers at most -c A, and where either clip holds: (N,) each."""
        free = ratio * advantage
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage
        gain = torch.minimum(free, clipped)  # the lower, so that nothing is gained beyond the clip
        is_clipped = free > clipped

        # The minimum leaves a bad answer's loss free to grow with its ratio; the dual clip (arXiv 1912.09729) does not.
        if self.dual_clip < torch.inf:
            floor = torch.where(advantage < 0, self.dual_clip * advantage, -torch.inf)
            is_clipped = is_clipped | (gain < floor)
            gain = torch.maximum(gain, floor)
        return -gain, is_clipped

    def estimator(self, reward_weights: Mapping[str, float]) -> AdvantageEstimator:
        """What makes advantages of rewards. reward_weights: by a reward's name."""
        return AdvantageEstimator(self.advantage, self.advantage_clip, self.negative_weight, reward_weights)

    def denominator(self, lengths: Sequence[int], longest: int) -> float:
        """The normaliser of a global batch of answers with these numbers of tokens, at most `longest` allowed."""
        denominators = {"token": sum(lengths), "sequence": len(lengths), "constant": len(lengths) * longest}
        return float(max(denominators[self.normalizer], 1))


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


KL: dict[str, Divergence] = {f.__name__: f for f in (k1, k2, k3)}
