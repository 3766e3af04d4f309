"""Optimizers: a dataclass of settings whose `build` takes the model and returns torch's optimizers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dirl_cli.ranges import NotNegative, Positive, Range, Share, ShareBelowOne, ShareOrCount

Rate = Annotated[float, Range(above=0, remark="at 0 nothing is learned")]


class Optim(Protocol):
    """Optimizer settings."""

    def build(self, model: PreTrainedModel) -> list[torch.optim.Optimizer]: ...


@dataclass(frozen=True)
class AdamW:
    """AdamW on all trainable parameters; weight decay on matrices only, not on norms and biases."""

    lr: Rate
    betas: tuple[ShareBelowOne, ShareBelowOne]
    eps: Positive
    weight_decay: NotNegative

    def build(self, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [adamw(parameters, self.lr, self.betas, self.eps, self.weight_decay)]


@dataclass(frozen=True)
class Muon:
    """Muon on the weight matrices of the layers, AdamW on the rest: embeddings, output head, norms, biases.

    lr: of Muon, scaled by sqrt(max(1, rows / columns)) (https://kellerjordan.github.io/posts/muon).
    adamw_lr, betas, eps: of the rest. weight_decay: of both, not on norms and biases.
    """

    lr: Rate
    momentum: ShareBelowOne
    adamw_lr: Annotated[float, Range(above=0, remark="at 0 embeddings, output head and norms stay as they are")]
    betas: tuple[ShareBelowOne, ShareBelowOne]
    eps: Positive
    weight_decay: NotNegative

    def build(self, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
        matrices = layer_matrices(model)
        by_muon = {id(p) for p in matrices}
        by_adamw = [p for p in model.parameters() if p.requires_grad and id(p) not in by_muon]
        muon = torch.optim.Muon(matrices, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if not by_adamw:  # as with LoRA, whose factors are all matrices of layers
            return [muon]
        return [muon, adamw(by_adamw, self.adamw_lr, self.betas, self.eps, self.weight_decay)]


def adamw(
    parameters: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; a group without parameters is left out."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = []
    if matrices:
        groups.append({"params": matrices, "weight_decay": weight_decay})
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)


def layer_matrices(model: PreTrainedModel) -> list[Tensor]:
    """The trainable weights of linear layers, the output head left out."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return [module.weight for module in linear if module.weight.requires_grad]


class Schedule(Protocol):
    """A learning-rate schedule: the factor on every rate at `step` (from 0) of `steps`, from 0 to 1."""

    def __call__(self, step: int, steps: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The full rate after the warm-up."""

    warmup: ShareOrCount

    def __call__(self, step: int, steps: int) -> float:
        return rise(step, warmup_steps(self.warmup, steps))


@dataclass(frozen=True)
class Linear:
    """A straight line from the full rate to `floor` times it."""

    warmup: ShareOrCount
    floor: Share

    def __call__(self, step: int, steps: int) -> float:
        warmup = warmup_steps(self.warmup, steps)
        return rise(step, warmup) * (1 - (1 - self.floor) * progress(step, warmup, steps))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the full rate to `floor` times it."""

    warmup: ShareOrCount
    floor: Share

    def __call__(self, step: int, steps: int) -> float:
        warmup = warmup_steps(self.warmup, steps)
        decay = (1 - math.cos(math.pi * progress(step, warmup, steps))) / 2
        return rise(step, warmup) * (1 - (1 - self.floor) * decay)


def warmup_remark(schedule: Schedule, steps: int) -> str | None:
    """A warning about a warm-up that is longer than the run, else None."""
    if not isinstance(schedule, Constant | Linear | Cosine) or warmup_steps(schedule.warmup, steps) <= steps:
        return None
    reached = steps / warmup_steps(schedule.warmup, steps)
    return f"schedule.warmup={schedule.warmup:g} is longer than the run: rates come to {reached:.0%} of their full ones"


def warmup_steps(warmup: float, steps: int) -> int:
    """How many steps the warm-up takes: a number below 1 is a fraction of the run, any other a number of steps."""
    if warmup < 1:
        return round(warmup * steps)
    return int(warmup)


def rise(step: int, warmup: int) -> float:
    """The warm-up's factor: a line that reaches 1 with its last step; the first step already learns."""
    return min(1.0, (step + 1) / max(warmup, 1))


def progress(step: int, warmup: int, steps: int) -> float:
    """How much of the run after the warm-up is over: 0 at its end, 1 with the last step."""
    return min(max(step + 1 - warmup, 0) / max(steps - warmup, 1), 1.0)
