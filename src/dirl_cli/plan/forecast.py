"""The memory that a run is going to take, from its settings and the lengths of what it learns from."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import Strip, join_strips
from dirl_cli.diffusion.masking import Masking, example, noised_strip
from dirl_cli.diffusion.states import BlockSpec, Views
from dirl_cli.dpo.pairs import Pair, Pairs, SampledPairs
from dirl_cli.models.load import DiffusionLM, pick_attention, pick_dtype
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.plan.architecture import architecture
from dirl_cli.plan.budget import Budget, Machine, Settings, halvings
from dirl_cli.plan.duration import SMALL, Duration, sampling_operations, update_operations
from dirl_cli.plan.memory import (
    SCORING,
    Bytes,
    Memory,
    MicroBatch,
    largest_micro_batch,
    logit_bytes,
    parallelism,
    to_whole_blocks,
)
from dirl_cli.rl.objective import Objective
from dirl_cli.rollout.engines import Engine, Lmdeploy, Native
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.optim import Optim
from dirl_cli.types import SHARDED_LAUNCHES, Decoding, Trajectory

UPDATE = ("micro_rows", "gradient_checkpointing", "row_tokens", "decoding.max_new_tokens")
FINETUNE = (*UPDATE, "steps", "launch", "batch_size", "max_tokens", "eval_problems")
ROLLOUT = ("rollout.max_batch", "rollout.cache_share", "rollout.products", "rl.async_rollout")
RL = (*UPDATE, *ROLLOUT, "steps", "launch", "rl.problems", "rl.group_size", "rl.mini_batches", "rl.epochs")
GPUS = (2, 4, 8)  # of one machine
ADAPTERS = ("lora", "qlora")
PROMPT = 1024  # tokens of prompts of which nothing is known
LEAST = 64  # tokens of a row, a demonstration or an answer that are worth proposing


@dataclass(frozen=True)
class TrainingSetup:
    """What is trained, how and on which machine, in fine-tuning, RL and DPO alike.

    lm: the model, without its weights. settings: those named in FINETUNE or RL. adapter: makes the choices of `peft`
    that may be proposed instead, by name; None if there is nothing else to propose.
    """

    lm: DiffusionLM
    optim: Optim
    machine: Machine
    settings: Settings
    peft: Peft = FullFinetune()
    adapter: Callable[[str], Peft] | None = None


def sft_budget(
    setup: TrainingSetup,
    masking: Masking,
    decoding: Decoding,
    lengths: NDArray[np.int64],
    prompts: Sequence[Sequence[int]],
) -> Budget:
    """Memory budget of an SFT run.

    lengths: tokens of each demonstration (N,). prompts: token ids of each problem that may be answered meanwhile, in
    order.
    """
    batch = partial(demonstration_batch, setup, masking, lengths)
    forecast = FinetuneForecast(setup, batch, decoding, prompts, MemoryByPeft(setup), SCORING, "tiny_sft")
    return finetune_budget(forecast)


def demonstration_batch(
    setup: TrainingSetup, masking: Masking, lengths: NDArray[np.int64], settings: Settings
) -> MicroBatch:
    """The largest micro-batch: steps of demonstrations of average length, rows that the longest fits into."""
    lm = setup.lm
    lengths = lengths[lengths <= max(settings["max_tokens"], lengths.min())]
    longest = int(lengths.max())
    demonstration = example([0] * longest, [True] * longest, lm.block_size, lm.pad_token_id)
    strip = noised_strip(demonstration, masking, lm.block_size, lm.mask_token_id, generator(0))
    strips = settings["batch_size"] * float(lengths.mean()) / longest
    return micro_batch_of(strip, strips, settings, setup.machine)


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


def finetune_budget(forecast: "FinetuneForecast") -> Budget:
    """Memory budget of a run that learns from rows of its own."""
    setup = forecast.setup
    settings = setup.settings
    batch = forecast.batch(settings)
    # Keys first whose change costs least: evaluation and long rows go last.
    knobs = {
        **sharding_knobs(settings, setup.machine, setup.peft),
        **update_knobs(settings, batch),
        "eval_problems": halvings(settings["eval_problems"], 1),
        "max_tokens": halvings(settings["max_tokens"], LEAST),
    }
    return budget_of(forecast, knobs, facts=f"{forecast.memories.of({})}\nabout {batch}")


@dataclass(frozen=True)
class FinetuneForecast:
    """What the phases of a run on demonstrations or pairs hold under any settings.

    batch: its largest micro-batch. prompts: see `sft_budget`. scoring: bytes of each logit that is scored. preset: the
    experiment for a model as small as the embedded one.
    """

    setup: TrainingSetup
    batch: Callable[[Settings], MicroBatch]
    decoding: Decoding
    prompts: Sequence[Sequence[int]]
    memories: "MemoryByPeft"
    scoring: int
    preset: str

    def phases(self, settings: Settings) -> dict[str, Bytes]:
        """What loading, updates and evaluations hold."""
        memory = self.memories.of(settings)
        phases = loading_phase(memory)
        phases["update"] = update_phase(memory, self.batch(settings), settings, self.scoring)
        if evaluated := self.prompts[: settings["eval_problems"]]:
            phases["evaluation"] = self.evaluation(memory, evaluated, settings)
        return phases

    def evaluation(self, memory: Memory, prompts: Sequence[Sequence[int]], settings: Settings) -> Bytes:
        """What is held while prompts are answered greedily."""
        of_process = math.ceil(len(prompts) / processes(settings, self.setup.machine))
        slots = min(NativeSampler(self.setup.lm).max_batch, of_process)
        greedy = replace(self.decoding, temperature=0.0)
        longest = max(len(prompt) for prompt in prompts)
        return rollout_phase(replace(memory, samples=True), slots, longest, self.setup.lm, greedy, settings)

    def duration(self, settings: Settings) -> Duration:
        """What the updates compute, and the reference's forwards where there is one; evaluations are left out."""
        model = self.memories.of({}).model
        batch = self.batch(settings)
        operations = update_operations(model, batch)
        if self.memories.reference:
            operations *= 4 / 3  # one forward more, where a forward and its backward count as three
        return Duration(
            settings["steps"],
            batch.step,
            batch.width,
            settings["steps"] * operations,
            is_bound=False,
            knobs="steps, batch_size or row_tokens",
            preset=self.preset if model.parameters < SMALL else None,
        )


def rl_budget(
    setup: TrainingSetup,
    objective: Objective,
    decoding: Decoding,
    longest_prompt: int,
    engine: Engine | None,
    learns: bool,
    teacher: int = 0,
    critic: str = "none",
) -> Budget:
    """Memory budget of an RL run.

    All answers are taken to be as long as they may be, and revealed in as many steps as they may take.
    longest_prompt: tokens of it. engine: what samples; None where rollouts are read from files. learns: whether there
    are updates. teacher: parameters of a model to stay near that is not the one it begins as. critic: what learns
    values: none, head or model.
    """
    settings = setup.settings
    memories = MemoryByPeft(
        setup,
        reference=objective.beta > 0,
        reference_moves=objective.reference_every > 0,
        teacher=teacher,
        critic=critic,
        samples=engine is not None,
    )
    forecast = RlForecast(setup, objective, decoding, longest_prompt, engine, learns, memories)
    batch = forecast.batch(settings)
    # Processes share a critic that is a model, and do not one that is a layer: of two remedies the better.
    sharding = {} if critic == "head" else sharding_knobs(settings, setup.machine, setup.peft)
    is_shared = settings["launch"] in SHARDED_LAUNCHES or any(sharding.values())
    # Keys first whose change costs least: what makes answers shorter changes the result, and goes last.
    knobs = {
        **sharding,
        "rollout.max_batch": halvings(settings["rollout.max_batch"], 1),
        "rollout.products": ["plain"] if isinstance(engine, Native) and engine.products != "plain" else [],
        "rollout.cache_share": [engine.cache_share / 2, engine.cache_share / 4] if isinstance(engine, Lmdeploy) else [],
        **update_knobs(settings, batch),
        "critic": ["head"] if critic == "model" and not is_shared else [],
        "decoding.max_new_tokens": halvings(settings["decoding.max_new_tokens"], LEAST),
    }
    return budget_of(forecast, knobs, facts=f"{memories.of({})}\nat most {batch}")


@dataclass(frozen=True)
class RlForecast:
    """What the phases of an RL run hold under any settings. The fields are `rl_budget`'s parameters."""

    setup: TrainingSetup
    objective: Objective
    decoding: Decoding
    longest_prompt: int
    engine: Engine | None
    learns: bool
    memories: "MemoryByPeft"

    def batch(self, settings: Settings) -> MicroBatch:
        """The largest micro-batch: all answers are the longest there may be, in the states that take most tokens."""
        lm = self.setup.lm
        answer = with_answer(self.longest_prompt, lm, settings) - self.longest_prompt
        longest = worst_case_trajectory(self.longest_prompt, answer, self.decoding.denoising_steps, lm.block_size)
        strip = self.objective.views(longest, BlockSpec(lm.block_size, lm.mask_token_id), generator(0))
        answers = settings["rl.problems"] * settings["rl.group_size"] / settings["rl.mini_batches"]
        return micro_batch_of(strip, answers, settings, self.setup.machine)

    def phases(self, settings: Settings) -> dict[str, Bytes]:
        """What loading, rollouts and updates hold, the latter two at once where they are asynchronous."""
        memory = self.memories.of(settings)
        # While a model is updated its sampler keeps a copy of its own: LMDeploy where it is gathered from shards, the
        # native engine where it samples meanwhile.
        if isinstance(self.engine, Lmdeploy):
            memory = replace(memory, copy_stays=memory.parallelism.gathers)
        else:
            memory = replace(memory, copy_stays=bool(settings["rl.async_rollout"]))

        phases: dict[str, Bytes] = {}
        if self.engine:
            phases["rollout"] = self.rollout(memory, self.engine, settings)
        if self.learns:
            phases["update"] = update_phase(memory, self.batch(settings), settings, logit_bytes(self.decoding))
        if settings["rl.async_rollout"]:
            phases = {"update and rollout": overlapping(phases.values(), memory.resident())}
        return loading_phase(memory) | phases

    def rollout(self, memory: Memory, engine: Engine, settings: Settings) -> Bytes:
        """What is held while `engine` answers a process's problems."""
        problems = math.ceil(settings["rl.problems"] / processes(settings, self.setup.machine))
        slots = min(settings["rollout.max_batch"], problems * settings["rl.group_size"])
        if isinstance(engine, Lmdeploy):
            free = self.setup.machine.free_bytes()
            tokens = slots * self.setup.lm.block_size
            return memory.lmdeploy(free, settings["rollout.cache_share"], tokens, self.decoding)
        return rollout_phase(memory, slots, self.longest_prompt, self.setup.lm, self.decoding, settings)

    def duration(self, settings: Settings) -> Duration:
        """What rollouts and updates compute."""
        model = self.memories.of({}).model
        batch = self.batch(settings)
        sampled_tokens = settings["rl.problems"] * settings["rl.group_size"] * settings["decoding.max_new_tokens"]
        operations = 0.0
        if self.learns:
            passes = settings["rl.mini_batches"] * settings["rl.epochs"]
            models = 2 if self.memories.critic == "model" else 1
            operations += models * passes * update_operations(model, batch)
        if self.engine:
            steps = self.decoding.denoising_steps or self.setup.lm.block_size
            operations += sampling_operations(model, sampled_tokens, steps)
        return Duration(
            settings["steps"],
            sampled_tokens,
            batch.width,
            settings["steps"] * operations,
            is_bound=True,
            knobs="steps, rl.problems, rl.group_size or decoding.max_new_tokens",
            preset="tiny_rl" if model.parameters < SMALL else None,
        )


def budget_of(forecast: FinetuneForecast | RlForecast, knobs: Mapping[str, Sequence[Any]], facts: str) -> Budget:
    """What a forecast comes to under the settings of its run. knobs, facts: see `Budget`."""
    setup = forecast.setup
    return Budget(
        forecast.phases,
        setup.settings,
        knobs,
        setup.machine,
        facts,
        alternatives=alternatives(setup, forecast.memories.critic) if setup.adapter else [],
        duration=forecast.duration(setup.settings),
    )


@dataclass(frozen=True)
class MemoryByPeft:
    """A model's memory by what of it is trained: as `setup.peft` says, or an adapter in its place.

    reference: whether a model to stay near is there. reference_moves: whether it follows the policy. teacher: the
    parameters of another model that it is. critic: what learns values: none, head or model.
    samples: whether a sampler is there. counted: by the name of an adapter, or None for `setup.peft`, what was counted
    before, since that takes a while.
    """

    setup: TrainingSetup
    reference: bool = False
    reference_moves: bool = False
    teacher: int = 0
    critic: str = "none"
    samples: bool = False
    counted: dict[str | None, Memory] = field(default_factory=dict)

    def of(self, settings: Settings) -> Memory:
        """The memory under settings, of which `peft` may name an adapter to propose."""
        name = settings.get("peft")
        if name not in self.counted:
            peft = self.setup.adapter(name) if name and self.setup.adapter else self.setup.peft
            self.counted[name] = self._count(peft)
        launch = settings.get("launch", "auto")
        return replace(
            self.counted[name],
            parallelism=parallelism(launch, processes(settings, self.setup.machine)),
            critic=settings.get("critic", self.critic) == "model",
            products=settings.get("rollout.products") or "auto",
        )

    def _count(self, peft: Peft) -> Memory:
        machine = self.setup.machine
        base_dtype = peft.base_dtype(machine.dtype, machine.kind)
        return Memory(
            architecture(self.setup.lm.model.config, self.setup.optim, peft, base_dtype),
            bf16=pick_dtype(machine.dtype, machine.kind) == torch.bfloat16,
            dense=pick_attention(machine.attention, machine.kind) == "sdpa",
            reference=self.reference,
            reference_moves=self.reference_moves,
            teacher=self.teacher,
            samples=self.samples,
            cuda=machine.kind == "cuda",
        )


def processes(settings: Settings, machine: Machine) -> int:
    """The number of processes: as many as there are, or as are proposed."""
    return int(settings.get("gpus", machine.gpus))


# The phases of a run


def loading_phase(memory: Memory) -> dict[str, Bytes]:
    """A phase of its own where processes will share the model: it is loaded whole by each."""
    if not memory.parallelism.gathers:
        return {}
    return {"loading": {"parameters": memory.model.weight_bytes}}


def update_phase(memory: Memory, batch: MicroBatch, settings: Settings, scoring: int = SCORING) -> Bytes:
    """What an update holds. scoring: bytes of each logit that is scored."""
    return replace(memory, checkpointing=settings["gradient_checkpointing"]).update(batch, scoring)


def rollout_phase(
    memory: Memory, slots: int, prompt: int, lm: DiffusionLM, decoding: Decoding, settings: Settings
) -> Bytes:
    """What the native engine holds. slots: answers at once. prompt: tokens of the longest."""
    return memory.rollout(slots, prompt, with_answer(prompt, lm, settings), lm.block_size, decoding)


def overlapping(phases: Iterable[Bytes], resident: Bytes) -> Bytes:
    """Phases that coincide: the parts that are `resident` counted once, all others added up."""
    total: Bytes = {}
    for phase in phases:
        for name, size in phase.items():
            if name in resident:
                total[name] = max(total.get(name, 0), size)
            else:
                total[name] = total.get(name, 0) + size
    return total


def micro_batch_of(strip: Strip, strips: float, settings: Settings, machine: Machine) -> MicroBatch:
    """The largest micro-batch of a step on as many tokens as `strips` times this strip, the longest, has."""
    count = processes(settings, machine)
    return largest_micro_batch(strip, strips, settings["row_tokens"], settings["micro_rows"], count)


def worst_case_trajectory(prompt: int, answer: int, steps: int | None, block_size: int) -> Trajectory:
    """The answer of so many tokens that takes most steps: each block reveals as little at a time as it may.

    prompt, answer: numbers of tokens. steps: of a block at most; None for as many as it has tokens.
    """
    end = to_whole_blocks(prompt + answer, block_size)
    most = min(steps or block_size, block_size)
    reveal_step = [position % block_size * most // block_size + 1 for position in range(prompt, end)]
    return Trajectory([0] * prompt, [0] * len(reveal_step), reveal_step)


def with_answer(prompt: int, lm: DiffusionLM, settings: Settings) -> int:
    """Tokens of a prompt and its longest answer."""
    return min(prompt + settings["decoding.max_new_tokens"], lm.longest_prompt + 1)


# What may be proposed instead


def update_knobs(settings: Settings, batch: MicroBatch) -> dict[str, Sequence[Any]]:
    """What makes an update smaller, the result the same: fewer rows, less kept of each layer, shorter rows."""
    return {
        "micro_rows": halvings(batch.rows, 1),
        "gradient_checkpointing": [] if settings["gradient_checkpointing"] else [True],
        "row_tokens": halvings(settings["row_tokens"], LEAST),
    }


def sharding_knobs(settings: Settings, machine: Machine, peft: Peft) -> dict[str, Sequence[Any]]:
    """What makes each of several processes take less: that they share the model."""
    can_shard = machine.gpus > 1 and settings["launch"] != "fsdp2" and isinstance(peft, FullFinetune)
    return {"launch": ["fsdp2"] if can_shard else []}


def alternatives(setup: TrainingSetup, critic: str) -> list[list[Settings]]:
    """Other ways to train the same model, each from the least change on: more GPUs that share it, and adapters.

    critic: none, head or model. With an adapter there is no second model; more GPUs that share the policy are not
    proposed with a critic, since a head, which is, could not be there.
    """
    if not isinstance(setup.peft, FullFinetune):
        return []

    more_gpus: list[Settings] = []
    if setup.machine.kind == "cuda" and critic == "none":
        more_gpus = [{"gpus": count, "launch": "fsdp2"} for count in GPUS if count > setup.machine.gpus]
    adapters: list[Settings] = [{"peft": name} for name in ADAPTERS]
    if setup.settings["launch"] in SHARDED_LAUNCHES:  # which adapters leave too little for
        adapters = [{**adapter, "launch": "auto"} for adapter in adapters]
    if critic == "model":
        adapters = [{**adapter, "critic": "head"} for adapter in adapters]
    return [more_gpus, adapters]
