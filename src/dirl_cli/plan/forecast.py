"""The memory that a run is going to take, from its settings and the lengths of what it learns from."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import Strip
from dirl_cli.diffusion.masking import Masking, example, noised_strip
from dirl_cli.diffusion.states import Tokens
from dirl_cli.models.load import DiffusionLM, pick_attention, pick_dtype
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.plan.budget import Budget, Machine, Settings, halvings
from dirl_cli.plan.duration import SMALL, Duration, sampling_operations, update_operations
from dirl_cli.plan.memory import (
    SCORING,
    Bytes,
    Memory,
    MicroBatch,
    architecture,
    largest_micro_batch,
    logit_bytes,
    parallelism,
)
from dirl_cli.rl.objective import Objective
from dirl_cli.rollout.engines import Engine, Lmdeploy
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.optim import Optim
from dirl_cli.types import SHARING, Decoding, Trajectory

UPDATE = ("micro_rows", "gradient_checkpointing", "row_tokens", "decoding.max_new_tokens")
SFT = (*UPDATE, "steps", "launch", "batch_size", "max_tokens", "eval_problems")
ROLLOUT = ("rollout.max_batch", "rollout.cache_share", "rl.async_rollout")
RL = (*UPDATE, *ROLLOUT, "steps", "launch", "rl.problems", "rl.group_size", "rl.mini_batches", "rl.epochs")
GPUS = (2, 4, 8)  # of one machine
ADAPTERS = ("lora", "qlora")
PROMPT = 1024  # tokens of prompts of which nothing is known
LEAST = 64  # tokens of a row, a demonstration or an answer that are worth proposing


def sft_budget(
    lm: DiffusionLM,
    optim: Optim,
    masking: Masking,
    decoding: Decoding,
    machine: Machine,
    settings: Settings,
    lengths: NDArray[np.int64],
    prompts: Sequence[Sequence[int]],
    peft: Peft = FullFinetune(),
    adapter: Callable[[str], Peft] | None = None,
) -> Budget:
    """Of fine-tuning on demonstrations of these lengths and answering these prompts.

    settings: those named in SFT. adapter: makes the choices of `peft` that may be proposed instead, by name.
    """
    memories = Memories(lm, optim, peft, adapter, machine)
    memory = memories.of({})

    def batch(settings: Settings) -> MicroBatch:
        kept = lengths[lengths <= max(settings["max_tokens"], lengths.min())]
        longest = int(kept.max())
        demonstration = example([0] * longest, [True] * longest, lm.block_size, lm.pad_token_id)
        strip = noised_strip(demonstration, masking, lm.block_size, lm.mask_token_id, generator(0))
        return packed_batch(strip, settings["batch_size"] * float(kept.mean()) / longest, settings, machine)

    def phases(settings: Settings) -> dict[str, Bytes]:
        shared = memories.of(settings)
        found = loading_phase(shared) | {"update": update(shared, batch(settings), settings)}
        if asked := prompts[: settings["eval_problems"]]:
            slots = min(NativeSampler(lm).max_batch, math.ceil(len(asked) / processes(settings, machine)))
            greedy = replace(decoding, temperature=0.0)
            found["evaluation"] = rollout(
                replace(shared, samples=True), slots, max(map(len, asked)), lm, greedy, settings
            )
        return found

    knobs = (
        sharing_knobs(settings, machine, peft)
        | update_knobs(settings, batch(settings))
        | {
            "eval_problems": halvings(settings["eval_problems"], 1),
            "max_tokens": halvings(settings["max_tokens"], LEAST),
        }
    )
    ways = other_ways(settings, machine, peft) if adapter else []
    duration = Duration(
        settings["steps"],
        batch(settings).step,
        batch(settings).width,
        settings["steps"] * update_operations(memory.model, batch(settings)),
        is_bound=False,
        knobs="steps, batch_size or row_tokens",
        preset="tiny_sft" if memory.model.parameters < SMALL else None,
    )
    return Budget(phases, settings, knobs, machine, f"{memory}\nabout {batch(settings)}", ways, duration)


def rl_budget(
    lm: DiffusionLM,
    optim: Optim,
    objective: Objective,
    decoding: Decoding,
    machine: Machine,
    settings: Settings,
    longest_prompt: int,
    engine: Engine | None,
    learns: bool,
    peft: Peft = FullFinetune(),
    adapter: Callable[[str], Peft] | None = None,
) -> Budget:
    """Of reinforcement on prompts of at most so many tokens. settings: those named in RL. engine: what samples, if any.

    adapter: makes the choices of `peft` that may be proposed instead, by name.
    All answers are taken to be as long as they may be, and revealed in as many steps as they may take.
    """
    memories = Memories(lm, optim, peft, adapter, machine, reference=objective.beta > 0, samples=engine is not None)
    memory = memories.of({})
    scoring = logit_bytes(decoding)
    tokens = Tokens(lm.block_size, lm.mask_token_id)

    def batch(settings: Settings) -> MicroBatch:
        answer = with_answer(longest_prompt, lm, settings) - longest_prompt
        longest = worst_case_trajectory(longest_prompt, answer, decoding.denoising_steps, lm.block_size)
        answers = settings["rl.problems"] * settings["rl.group_size"] / settings["rl.mini_batches"]
        return packed_batch(objective.views(longest, tokens, generator(0)), answers, settings, machine)

    def phases(settings: Settings) -> dict[str, Bytes]:
        problems = math.ceil(settings["rl.problems"] / processes(settings, machine))
        slots = min(settings["rollout.max_batch"], problems * settings["rl.group_size"])
        shared = memories.of(settings)
        uses_copy = shared.parallelism.gathers if isinstance(engine, Lmdeploy) else settings["rl.async_rollout"]
        shared = replace(shared, copy_stays=bool(uses_copy))
        found: dict[str, Bytes] = {}
        if isinstance(engine, Lmdeploy):
            share = settings["rollout.cache_share"]
            found["rollout"] = shared.lmdeploy(machine.free_bytes(), share, slots * lm.block_size, decoding)
        elif engine:
            found["rollout"] = rollout(shared, slots, longest_prompt, lm, decoding, settings)
        if learns:
            found["update"] = update(shared, batch(settings), settings, scoring)
        if settings["rl.async_rollout"]:
            found = {"update and rollout": overlapping(found.values(), shared.resident())}
        return loading_phase(shared) | found

    knobs = {
        **sharing_knobs(settings, machine, peft),
        "rollout.max_batch": halvings(settings["rollout.max_batch"], 1),
        "rollout.cache_share": [engine.cache_share / part for part in (2, 4)] if isinstance(engine, Lmdeploy) else [],
        **update_knobs(settings, batch(settings)),
        "decoding.max_new_tokens": halvings(settings["decoding.max_new_tokens"], LEAST),
    }
    ways = other_ways(settings, machine, peft) if adapter else []
    passes = settings["rl.mini_batches"] * settings["rl.epochs"]
    sampled = settings["rl.problems"] * settings["rl.group_size"] * settings["decoding.max_new_tokens"]
    operations = passes * update_operations(memory.model, batch(settings)) * learns
    if engine:
        operations += sampling_operations(memory.model, sampled, decoding.denoising_steps or lm.block_size)
    duration = Duration(
        settings["steps"],
        sampled,
        batch(settings).width,
        settings["steps"] * operations,
        is_bound=True,
        knobs="steps, rl.problems, rl.group_size or decoding.max_new_tokens",
        preset="tiny_rl" if memory.model.parameters < SMALL else None,
    )
    return Budget(phases, settings, knobs, machine, f"{memory}\nat most {batch(settings)}", ways, duration)


@dataclass(frozen=True)
class Memories:
    """A model's memory by what of it is trained: as `peft` says, or an adapter in its place."""

    lm: DiffusionLM
    optim: Optim
    peft: Peft
    adapter: Callable[[str], Peft] | None
    machine: Machine
    reference: bool = False
    samples: bool = False
    known: dict[str | None, Memory] = field(default_factory=dict)

    def of(self, settings: Settings) -> Memory:
        name = settings.get("peft")
        if name not in self.known:
            self.known[name] = self._made(self.adapter(name) if name and self.adapter else self.peft)
        count = processes(settings, self.machine)
        return replace(self.known[name], parallelism=parallelism(settings.get("launch", "auto"), count))

    def _made(self, peft: Peft) -> Memory:
        machine = self.machine
        return Memory(
            architecture(self.lm.model.config, self.optim, peft, peft.base_dtype(machine.dtype, machine.kind)),
            bf16=pick_dtype(machine.dtype, machine.kind) == torch.bfloat16,
            dense=pick_attention(machine.attention, machine.kind) == "sdpa",
            reference=self.reference,
            samples=self.samples,
            cuda=machine.kind == "cuda",
        )


def processes(settings: Settings, machine: Machine) -> int:
    """As many as there are, or as are proposed."""
    return int(settings.get("gpus", machine.gpus))


def other_ways(settings: Settings, machine: Machine, peft: Peft) -> list[list[Settings]]:
    """More GPUs that share the model, and adapters beside it: what to propose to who trains all of it."""
    if not isinstance(peft, FullFinetune):
        return []
    more = [count for count in GPUS if count > machine.gpus and machine.kind == "cuda"]
    alone = {"launch": "auto"} if settings["launch"] in SHARING else {}  # which adapters leave too little for
    return [[{"gpus": count, "launch": "fsdp2"} for count in more], [{"peft": name, **alone} for name in ADAPTERS]]


def worst_case_trajectory(prompt: int, answer: int, steps: int | None, block_size: int) -> Trajectory:
    """The answer of so many tokens that takes most steps: each block reveals as little at a time as it may."""
    end = -(-(prompt + answer) // block_size) * block_size
    most = min(steps or block_size, block_size)
    reveal_step = [place % block_size * most // block_size + 1 for place in range(prompt, end)]
    return Trajectory([0] * prompt, [0] * len(reveal_step), reveal_step)


def packed_batch(strip: Strip, strips: float, settings: Settings, machine: Machine) -> MicroBatch:
    count = processes(settings, machine)
    return largest_micro_batch(strip, strips, settings["row_tokens"], settings["micro_rows"], count)


def update(memory: Memory, batch: MicroBatch, settings: Settings, scoring: int = SCORING) -> Bytes:
    return replace(memory, checkpointing=settings["gradient_checkpointing"]).update(batch, scoring)


def rollout(memory: Memory, slots: int, prompt: int, lm: DiffusionLM, decoding: Decoding, settings: Settings) -> Bytes:
    return memory.rollout(slots, prompt, with_answer(prompt, lm, settings), lm.block_size, decoding)


def with_answer(prompt: int, lm: DiffusionLM, settings: Settings) -> int:
    """Tokens of a prompt and its longest answer."""
    return min(prompt + settings["decoding.max_new_tokens"], lm.longest_prompt + 1)


def overlapping(phases: Iterable[Bytes], resident: Bytes) -> Bytes:
    """Phases that coincide: what is resident once, all else of each."""
    found: Bytes = {}
    for phase in phases:
        for name, size in phase.items():
            found[name] = max(found.get(name, 0), size) if name in resident else found.get(name, 0) + size
    return found


def loading_phase(memory: Memory) -> dict[str, Bytes]:
    """A model that processes will share is loaded whole by each."""
    return {"loading": {"parameters": memory.model.weight_bytes}} if memory.parallelism.gathers else {}


def sharing_knobs(settings: Settings, machine: Machine, peft: Peft) -> dict[str, Sequence[Any]]:
    """What makes several processes take less each."""
    can_shard = machine.gpus > 1 and settings["launch"] != "fsdp2" and isinstance(peft, FullFinetune)
    return {"launch": ["fsdp2"] if can_shard else []}


def update_knobs(settings: Settings, batch: MicroBatch) -> dict[str, Sequence[Any]]:
    """What makes an update smaller, the result the same: fewer rows, less kept of each layer, shorter rows."""
    return {
        "micro_rows": halvings(batch.rows, 1),
        "gradient_checkpointing": [] if settings["gradient_checkpointing"] else [True],
        "row_tokens": halvings(settings["row_tokens"], LEAST),
    }
