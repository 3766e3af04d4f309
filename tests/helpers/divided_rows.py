"""Rows divided among processes beside the same rows in one: python -m tests.helpers.divided_rows  # by torchrun."""

import os
import sys
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from dirl_cli.diffusion.layout import Rows, pack
from dirl_cli.diffusion.states import BlockSpec, Trace
from dirl_cli.models.attention_cpu import TILES
from dirl_cli.models.context import UNDIVIDED, ContextGroup
from dirl_cli.models.load import DiffusionLM, diffusion_lm
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM
from dirl_cli.training.layers import checkpoint_layers, compile_layers
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.parallel import context_group, start_accelerator
from dirl_cli.types import Decoding, Trajectory
from tests.helpers.small import EXPERTS, MASK, PAD, SIZES

BLOCK = 3  # so that rows are of lengths that 2 and 4 do not divide


def model(key_heads: int, attention: str, experts: bool, shifted: bool) -> DiffusionLM:
    """Four heads of queries, sharpened."""
    sizes: dict[str, Any] = SIZES | {"num_key_value_heads": key_heads, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    if experts:
        config: Any = SDARMoeConfig(**sizes, **EXPERTS)
        config._attn_implementation = attention
        lm = SDARMoeForCausalLM(config)
    else:
        config = SDARConfig(**sizes)
        config._attn_implementation = attention
        lm = SDARForCausalLM(config)
    config.logit_shift = shifted
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return diffusion_lm(lm.eval(), None, BLOCK, MASK)


def rows(answer: int) -> Rows:
    """Two rows of answers whose blocks were revealed in three steps, the second row shorter than the first."""
    strips = []
    for number, length in enumerate((answer, answer // 2)):
        ids = [2 + (7 * i + number) % 40 for i in range(length // BLOCK * BLOCK)]
        steps = [1 + (i * i + number) % 3 for i in range(len(ids))]
        trajectory = Trajectory([2 + i for i in range(BLOCK)], ids, steps)
        strips.append(Trace()(trajectory, BlockSpec(BLOCK, MASK), torch.Generator()))
    return pack(strips, len(strips[0]), BLOCK, PAD)


def found(lm: DiffusionLM, packed: Rows, context: ContextGroup, options: Decoding | None) -> list[Tensor]:
    """Log-probs, entropies, is_likeliest and the gradient of a loss of them, summed over the processes of the group."""
    scorer = LogprobModel(lm.model, lm.unsampled_ids, options, context=context)
    scorer.zero_grad()
    with torch.set_grad_enabled(lm.model.config._attn_implementation != "flex_attention"):
        logprobs, entropies, likeliest = scorer(packed)
    scores = [logprobs.detach(), entropies.detach(), likeliest.float()]
    if not logprobs.requires_grad:
        return scores
    upstream = torch.linspace(-1, 2, len(logprobs))
    (upstream * logprobs + 0.1 * entropies * logprobs).sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in lm.model.parameters()])
    if context.size > 1:
        torch.distributed.all_reduce(gradient)
    return [*scores, gradient]


def compare(
    context: ContextGroup,
    key_heads: int = 2,
    attention: str = "sdpa",
    answer: int = 45,
    experts: bool = False,
    shifted: bool = False,
    checkpointing: bool | str = False,
    compiled: bool = False,
    options: Decoding | None = None,
) -> None:
    """Raises AssertionError where a number is not what one process finds."""
    packed = rows(answer)
    expected = found(model(key_heads, attention, experts, shifted), packed, UNDIVIDED, options)
    lm = model(key_heads, attention, experts, shifted)
    checkpoint_layers(lm.model.train(), checkpointing)
    if compiled:
        compile_layers(lm.model, "aot_eager")
    divided = found(lm, packed, context, options)
    for ours, theirs in zip(divided, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), (ours - theirs).norm() / theirs.norm()


if __name__ == "__main__":
    accelerator = start_accelerator("cpu", "float32")
    group = context_group(accelerator, int(os.environ["WORLD_SIZE"]))
    assert rows(45).token_ids.shape[1] % group.size, "some rows are to be no multiple"
    if sys.argv[1:] == ["compiled"]:
        compare(group, compiled=True)
        compare(group, 1, compiled=True, checkpointing=True)
        sys.exit()
    for key_heads in (1, 2, 4):
        compare(group, key_heads)
        compare(group, key_heads, TILES, answer=450)
    compare(group, attention="flex_attention")
    compare(group, experts=True)
    compare(group, shifted=True)
    compare(group, checkpointing=True)
    compare(group, 1, TILES, answer=450, checkpointing="attention")
    compare(group, options=Decoding(temperature=0.7, top_k=5))
