"""What `dirl dpo` is going to take: as fine-tuning, on pairs of answers and beside a reference."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import join_strips
from dirl_cli.diffusion.states import BlockSpec, Views
from dirl_cli.dpo.pairs import Pair, Pairs, SampledPairs
from dirl_cli.models.load import DiffusionLM
from dirl_cli.plan.budget import Budget, Settings
from dirl_cli.plan.forecast import PROMPT, MemoryByPeft, TrainingSetup, micro_batch_of, worst_case_trajectory
from dirl_cli.plan.memory import MicroBatch, logit_bytes
from dirl_cli.plan.sft_forecast import FinetuneForecast, finetune_budget
from dirl_cli.types import Decoding


def dpo_budget(
    setup: TrainingSetup, views: Views, decoding: Decoding, pairs: Pairs, prompts: Sequence[Sequence[int]]
) -> Budget:
    """Memory budget of a run on pairs. prompts: token ids of each problem that may be answered meanwhile, in order."""
    batch = partial(pair_batch, setup, views, pairs)
    memories = MemoryByPeft(setup, reference=True)
    return finetune_budget(
        FinetuneForecast(setup, batch, decoding, prompts, memories, logit_bytes(decoding), "tiny_dpo")
    )


def pair_batch(setup: TrainingSetup, views: Views, pairs: Pairs, settings: Settings) -> MicroBatch:
    """The largest micro-batch: steps of pairs of average cost, rows that the costliest fits into."""
    lm = setup.lm
    lengths = pairs.lengths
    costs = pairs.costs * (lengths <= max(settings["max_tokens"], lengths.min()))  # (P,), 0 for those left out
    costliest = pairs[int(costs.argmax())]
    spec = BlockSpec(lm.block_size, lm.mask_token_id)
    strip = join_strips([views(answer, spec, generator(0)) for answer in costliest.answers], lm.block_size)
    strips = settings["batch_size"] * float(costs[costs > 0].mean() / costs.max())
    return micro_batch_of(strip, strips, settings, setup.machine)


def unknown_pairs(lm: DiffusionLM, decoding: Decoding, longest: int) -> Pairs:
    """A pair of `longest` tokens an answer and prompt that takes as much as any may, where the data is unknown."""
    prompt = min(PROMPT, longest // 2)
    chosen = worst_case_trajectory(prompt, longest - prompt, decoding.denoising_steps, lm.block_size)
    rejected = replace(chosen, token_ids=[1] * len(chosen.token_ids))  # no token of which is the other's, too
    return SampledPairs([Pair(chosen, rejected)], lm.block_size)
