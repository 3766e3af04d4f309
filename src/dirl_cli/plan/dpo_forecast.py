"""What `dirl dpo` is going to take: as fine-tuning, on pairs of answers and beside a reference."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import Strip, join_strips
from dirl_cli.diffusion.states import BlockSpec, Views
from dirl_cli.dpo.pairs import Pair, Pairs, SampledPairs
from dirl_cli.models.load import DiffusionLM
from dirl_cli.plan.budget import Budget, Settings
from dirl_cli.plan.forecast import PROMPT, MemoryByPeft, TrainingSetup, micro_batch_of, worst_case_trajectory
from dirl_cli.plan.memory import MicroBatch, logit_bytes
from dirl_cli.plan.sft_forecast import FinetuneForecast, finetune_budget
from dirl_cli.plan.time import Work, work_of
from dirl_cli.types import Decoding


def dpo_budget(
    setup: TrainingSetup,
    views: Views,
    decoding: Decoding,
    pairs: Pairs,
    prompts: Sequence[Sequence[int]],
    known: bool = True,
) -> Budget:
    """Memory budget of a run on pairs. prompts: token ids of each problem that may be answered meanwhile, in order.

    known: whether the pairs are; else they are such as take most.
    """
    forecast = FinetuneForecast(
        setup,
        partial(pair_batch, setup, views, pairs),
        partial(pair_work, setup, views, pairs),
        decoding,
        prompts,
        MemoryByPeft(setup, reference=True),
        logit_bytes(decoding),
        "tiny_dpo",
        is_bound=not known,
        learned=f"pairs whose longer answer and prompt are {pairs.lengths.mean():,.0f} tokens",
        before=True,
    )
    return finetune_budget(forecast)


def pair_batch(setup: TrainingSetup, views: Views, pairs: Pairs, settings: Settings) -> MicroBatch:
    """The largest micro-batch: steps of pairs of average cost, rows that the costliest fits into."""
    strip, strips = costliest_pair(setup, views, pairs, settings)
    return micro_batch_of(strip, strips, settings, setup.machine)


def pair_work(setup: TrainingSetup, views: Views, pairs: Pairs, settings: Settings) -> Work:
    """What a step on pairs of average cost computes."""
    strip, strips = costliest_pair(setup, views, pairs, settings)
    return work_of(strip, setup.lm.block_size).times(strips)


def costliest_pair(setup: TrainingSetup, views: Views, pairs: Pairs, settings: Settings) -> tuple[Strip, float]:
    """The pair that takes most as a strip, and how many such strips cost as much as a step of average pairs."""
    lm = setup.lm
    lengths = pairs.lengths
    costs = pairs.costs * (lengths <= max(settings["max_tokens"], lengths.min()))  # (P,), 0 for those left out
    costliest = pairs[int(costs.argmax())]
    spec = BlockSpec(lm.block_size, lm.mask_token_id)
    strip = join_strips([views(answer, spec, generator(0)) for answer in costliest.answers], lm.block_size)
    return strip, settings["batch_size"] * float(costs[costs > 0].mean() / costs.max())


def unknown_pairs(lm: DiffusionLM, decoding: Decoding, longest: int) -> Pairs:
    """A pair of `longest` tokens an answer and prompt that takes as much as any may, where the data is unknown."""
    prompt = min(PROMPT, longest // 2)
    chosen = worst_case_trajectory(prompt, longest - prompt, decoding.denoising_steps, lm.block_size)
    rejected = replace(chosen, token_ids=[1] * len(chosen.token_ids))  # no token of which is the other's, too
    return SampledPairs([Pair(chosen, rejected)], lm.block_size)
