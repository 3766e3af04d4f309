"""Optimizers: a dataclass of settings whose `build` takes the model and returns torch's optimizers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dirl_cli.ranges import NotNegative, Positive, Range, ShareBelowOne

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
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        muon = torch.optim.Muon(matrices, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if not rest:  # as with LoRA, whose factors are all matrices of layers
            return [muon]
        return [muon, adamw(rest, self.adamw_lr, self.betas, self.eps, self.weight_decay)]


def adamw(
    parameters: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True
    )


def layer_matrices(model: PreTrainedModel) -> list[Tensor]:
    """The trainable weights of linear layers, the output head left out."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return [module.weight for module in linear if module.weight.requires_grad]
