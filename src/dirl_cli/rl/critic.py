"""What each denoising step of an answer is worth: values of the states it went through, and advantages by GAE.

TraceRL (arXiv 2509.06949, Gen-Verse/dLLM-RL train_sdar_value.py). The steps of an answer, block by block, are what the
views of a trace score, several merged into one or not. With means over a step's tokens marked by *, and all that comes
after the last step 0:

    δ_s = r*_s - V*_s + γ V*_{s+1}       A*_s = δ_s + γλ A*_{s+1}       R*_s = r*_s + γ R*_{s+1}
    of token j of step s:   A_j = r_j - V_j + γ V*_{s+1} + γλ A*_{s+1},   R_j = r_j + γ R*_{s+1}

r is what the answer is worth beside its group's others, paid to its last step, and any process reward of the step.
Where γ = λ = 1, A_j = R_j - V_j. Without a critic V is 0 and λ 1.

Shapes: N scored tokens, S steps of all answers, D values of a hidden state.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import MergedTrace, Trace
from dirl_cli.errors import DirlError
from dirl_cli.models.attention import states_at
from dirl_cli.models.context import UNDIVIDED, ContextGroup
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.models.sharded_tensors import is_sharded
from dirl_cli.ranges import NotNegative, Positive, Share, ShareBelowOne, SomeShare
from dirl_cli.rl.objective import Cap, Objective
from dirl_cli.rl.units import unit_index
from dirl_cli.training.optim import Rate, adamw
from dirl_cli.training.sharded_model import second_model
from dirl_cli.training.trainer import MicroBatches, Sums, Trainer
from dirl_cli.types import SHARDED_LAUNCHES


@dataclass(frozen=True)
class NoCritic:
    """No values are learned. gamma: the factor on a reward for every step between it and a token."""

    gamma: SomeShare
    kind: ClassVar = "none"


@dataclass(frozen=True)
class LearnedCritic:
    """How values are learned.

    separate: by a second model, which begins as the policy; else by a layer on the policy's hidden states, which it
    leaves alone. gamma: the factor on a reward for every step between it and a token. gae_lambda: between the next
    step's value (0) and what came of it (1). value_clip: how far from the value before an update its loss follows.
    lr, betas, eps, weight_decay: of its own AdamW.
    """

    separate: bool
    gamma: SomeShare
    gae_lambda: Share
    value_clip: Cap
    lr: Rate
    betas: tuple[ShareBelowOne, ShareBelowOne]
    eps: Positive
    weight_decay: NotNegative

    @property
    def kind(self) -> str:
        return "model" if self.separate else "head"

    def require(self, peft: Peft, launch: str) -> None:
        """Raises DirlError where it cannot be trained beside what `peft` trains, in the way that `launch` says."""
        if self.separate and not isinstance(peft, FullFinetune):
            raise DirlError(
                "critic=model trains a second model whole, which peft saves the memory of: give critic=head"
            )
        if not self.separate and launch in SHARDED_LAUNCHES:
            raise DirlError(
                f"launch={launch} shares out the policy, whose hidden states critic=head reads: give critic=model, or"
                " launch=auto"
            )

    def model(self, lm: DiffusionLM, context: ContextGroup = UNDIVIDED) -> "ValueModel":
        """What gives the values; to be called before the policy learns."""
        if self.separate:
            if is_sharded(lm.model):
                lm = second_model(lm, FullFinetune(), shards=True, learns=True)
                return ValueModel(lm.model.get_decoder(), is_own=True, context=context)
            return ValueModel(copy.deepcopy(lm.model.get_decoder()), is_own=True, context=context)
        return ValueModel(lm.model, is_own=False, context=context)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return adamw(list(model.parameters()), self.lr, self.betas, self.eps, self.weight_decay)


class ValueModel(nn.Module):
    """A value for each scored token: its mask's last hidden state times a weight (D,), which begins as 0.

    is_own: whether the decoder learns, too; the policy's does not, and is kept out of this model's parameters.
    context: the processes that divide rows among them.
    """

    def __init__(self, decoder: PreTrainedModel, is_own: bool, context: ContextGroup = UNDIVIDED) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(decoder.config.hidden_size, device=decoder.device))
        self.is_own = is_own
        self.context = context
        self._no_split_modules: Collection[str] = ()  # the layers that Accelerate shards one by one
        self._policy: list[PreTrainedModel] = []
        if is_own:
            self.decoder = decoder
            self._no_split_modules = decoder._no_split_modules or ()
        else:
            self._policy = [decoder]  # in a list, which torch does not look into

    def forward(self, rows: Rows) -> tuple[Tensor]:
        """Values in fp32, (N,), alone in a tuple as scores are."""
        if self.is_own:
            at_masks, own = states_at(self.decoder, rows, self.context)
        else:
            with torch.no_grad():
                at_masks, own = states_at(self._policy[0].eval(), rows, self.context)
        values = (at_masks.float() * self.weight).sum(-1)  # no product of matrices, which autocast would round
        return (self.context.gather(values, own, len(rows.targets)),)


@dataclass(frozen=True)
class Critic:
    """What learns the values of states, beside the policy. trainer: of a ValueModel. clip: see `loss`."""

    trainer: Trainer
    clip: float

    def step(self, micro_batches: MicroBatches, tokens: int) -> dict[str, float]:
        """Take an optimizer step on the mean loss of all scored tokens, of which there are `tokens`."""
        return self.trainer.step(micro_batches, self.loss, max(tokens, 1))

    def loss(self, rows: Rows, values: Tensor) -> Sums:
        """Sums over the scored tokens: ½ max((V - R)², (V_old + clip(V - V_old, ±ε) - R)²), and moments of R.

        rows.extras: `values` before the first update of the rollout, and `returns`. Tokens that the policy learns
        nothing from, such as an untrained tail, have values like all others.
        """
        old, returns = rows.extras["values"], rows.extras["returns"]
        near = old + (values - old).clamp(-self.clip, self.clip)
        error = returns - old
        return {
            "loss": torch.maximum((values - returns).square(), (near - returns).square()).sum() / 2,
            "return": returns.sum(),
            "return_square": returns.square().sum(),
            "error": error.sum(),
            "error_square": error.square().sum(),
        }


def value_metrics(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a rollout's optimizer steps of a critic.

    explained_variance: 1 - Var(R - V) / Var(R), V being the values before the first of them; 0 where R is constant.
    """
    mean = {name: fmean(step[name] for step in steps) for name in steps[0]}
    variance = mean["return_square"] - mean["return"] ** 2
    left = mean["error_square"] - mean["error"] ** 2
    return {
        "value_loss": mean["loss"],
        "value_grad_norm": mean["grad_norm"],
        "value_lr": mean["lr"],
        "explained_variance": 1 - left / variance if variance > 1e-12 else 0.0,
    }


@dataclass(frozen=True)
class StepAdvantages:
    """Generalised advantage estimation over denoising steps; see the formulas above."""

    gamma: float = 1.0
    gae_lambda: float = 1.0

    def __call__(self, rows: Rows) -> Rows:
        """The rows with `advantage` and `returns` of each scored token (N,).

        rows.extras: `advantage`, the answer's; `values`, 0 without a critic; and `process_reward`, each token's share
        of what its step earned.
        """
        extras = rows.extras
        sample = extras["sample"]
        step = unit_index("step", rows)  # (N,), in the order in which steps happened
        sample_of_step = sample.new_zeros(int(step.max()) + 1).scatter(0, step, sample)  # (S,)
        is_last = pad(sample_of_step.diff() != 0, (0, 1), value=True)  # (S,)
        values = extras.get("values", torch.zeros_like(extras["advantage"]))

        reward = torch.where(is_last, mean_of_step(extras["advantage"], step), 0.0)  # (S,), the same for its tokens
        if "process_reward" in extras:
            reward = reward.index_add(0, step, extras["process_reward"])
        next_value, next_advantage, next_return = self._ahead(reward, mean_of_step(values, step), is_last)[:, step]
        advantage = reward[step] - values + self.gamma * (next_value + self.gae_lambda * next_advantage)
        returns = reward[step] + self.gamma * next_return
        return replace(rows, extras={**extras, "values": values, "advantage": advantage, "returns": returns})

    def _ahead(self, rewards: Tensor, values: Tensor, is_last: Tensor) -> Tensor:
        """V*, A* and R* of the step after each, (3, S), from those of the steps (S,)."""
        ahead = []
        value = advantage = return_ = 0.0
        steps = zip(rewards.tolist(), values.tolist(), is_last.tolist(), strict=True)
        for reward, own_value, ends in reversed(list(steps)):
            if ends:
                value = advantage = return_ = 0.0
            ahead.append((value, advantage, return_))
            advantage = reward - own_value + self.gamma * value + self.gamma * self.gae_lambda * advantage
            return_ = reward + self.gamma * return_
            value = own_value
        return torch.tensor(ahead[::-1]).T


def mean_of_step(values: Tensor, step: Tensor) -> Tensor:
    """The mean over each step's tokens: (S,) from (N,). step: (N,), the step of each."""
    counts = step.bincount()
    return values.new_zeros(len(counts)).index_add(0, step, values) / counts


def require_whole_trace(objective: Objective, what: str) -> None:
    """Raises DirlError where an objective does not score every denoising step. what: wants them, for the sentence."""
    if not isinstance(objective.views, Trace | MergedTrace):
        raise DirlError(f"{what} wants every step of the trace, which algo={objective.name} does not score: give dipo")
