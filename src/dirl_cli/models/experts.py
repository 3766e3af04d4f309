"""The experts of a mixture without asking the device which of them are used, so that a CUDA graph can hold them.

transformers' own loop over experts asks, and it is what the models of `models/sdar.py` would be given on any device.

Shapes: T tokens of which each takes K experts, S = T K pairs of a token and its expert, E experts, D hidden size, I
inner size of an expert.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

GROUPED = "dirl_grouped"  # by which transformers knows `grouped_experts`
ALIGNMENT = 8  # rows: the gradient of a weight is a product along an expert's rows, which CUDA wants in 16 bytes


def choose_experts(model: PreTrainedModel) -> None:
    """Have a model's experts computed as its device does it best: grouped on a GPU, one after another on a CPU."""
    if model.device.type == "cuda":
        model.config._experts_implementation = GROUPED


def grouped_experts(module: Any, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """The weighted sum of what each token's experts make of it: (T, D).

    module: a layer's experts, transformers' module. hidden: (T, D). expert_ids, expert_weights: (T, K). Products are
    taken in autocast's dtype, as those of other layers are.
    """
    # Whatever else an architecture may do to its experts, transformers knows.
    if module.has_bias or module.is_transposed or not module.has_gate:
        return grouped_mm_experts_forward(module, hidden, expert_ids, expert_weights)

    device = hidden.device.type
    dtype = module.gate_up_proj.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if device == "cuda" and dtype != torch.bfloat16:
        return each_expert_of_all(module, hidden.to(dtype), expert_ids, expert_weights).to(hidden.dtype)

    place, ends, rows = group_by_expert(expert_ids.flatten(), module.num_experts, torch.is_grad_enabled())
    pairs = hidden.repeat_interleave(expert_ids.shape[1], 0).to(dtype)  # (S, D)
    grouped = pairs.new_zeros(rows, pairs.shape[1]).index_copy(0, place, pairs)
    gate_up = grouped_mm(grouped, module.gate_up_proj.to(dtype).transpose(1, 2), offs=ends)  # (rows, 2 I)
    out = grouped_mm(module._apply_gate(gate_up), module.down_proj.to(dtype).transpose(1, 2), offs=ends)

    # As transformers does: weighted in the dtype of the weights, and summed in the order of each token's experts.
    weighted = out.index_select(0, place) * expert_weights.reshape(-1, 1)  # (S, D)
    return weighted.view(*expert_ids.shape, -1).sum(1).to(hidden.dtype)


def each_expert_of_all(module: Any, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """As `grouped_experts`, by E / K times the work: every expert computes all tokens.

    For dtypes of which CUDA has no grouped product that a graph could hold. A copy of its experts' weights for each
    token, transformers' `batched_mm`, would take hundreds of GB.
    """
    share = expert_weights.new_zeros(len(hidden), module.num_experts).scatter_add(1, expert_ids, expert_weights)
    total = torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        gate_up = linear(hidden, module.gate_up_proj[expert])  # (T, 2 I)
        out = linear(module._apply_gate(gate_up), module.down_proj[expert])
        total = total + share[:, expert, None] * out
    return total


def group_by_expert(expert_ids: Tensor, experts: int, aligned: bool) -> tuple[Tensor, Tensor, int]:
    """Where each of S pairs stands among rows in which each expert's are side by side.

    expert_ids: (S,). aligned: every expert gets at least one row, and a multiple of ALIGNMENT; those that no pair has
    are to be 0. Returns the pairs' rows (S,), the experts' ends (E,) and how many rows there are: no number that the
    device would have to be asked for.
    """
    counts = expert_ids.new_zeros(experts).scatter_add(0, expert_ids, torch.ones_like(expert_ids))
    order = expert_ids.argsort(stable=True)  # pairs by expert
    first = counts.cumsum(0) - counts  # of each expert, in this order
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))

    rows = len(expert_ids)
    sizes = counts
    if aligned:
        rows = -(-(rows + ALIGNMENT * experts) // ALIGNMENT) * ALIGNMENT
        sizes = (counts.clamp(min=1) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    ends = sizes.cumsum(0)
    place = rank + (ends - sizes - first)[expert_ids]

    # The last expert has all rows that are left, so that each row is computed by one.
    ends = torch.cat([ends[:-1], ends.new_full((1,), rows)])
    return place, ends.int(), rows


ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped_experts)
