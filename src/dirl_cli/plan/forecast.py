"""What the forecasts of sft, dpo and rl have in common: the set-up, the phases of a run, what may be proposed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from dirl_cli.diffusion.layout import Strip
from dirl_cli.models.attention_cpu import TILES
from dirl_cli.models.load import DiffusionLM, fitting_attention, pick_attention, pick_dtype
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.plan.architecture import architecture
from dirl_cli.plan.budget import Budget, Machine, Settings, format_bytes, halvings
from dirl_cli.plan.devices import Device
from dirl_cli.plan.duration import Duration
from dirl_cli.plan.memory import (
    SCORING,
    Bytes,
    Memory,
    MicroBatch,
    largest_micro_batch,
    parallelism,
    to_whole_blocks,
)
from dirl_cli.plan.time import (
    NOTHING_ASSUMED,
    Assumptions,
    TimePlan,
    Work,
    backpropagation_seconds,
    forward_seconds,
    optimizer_seconds,
    rows_seconds,
)
from dirl_cli.rollout.engines import Engine, Lmdeploy, Native
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.layers import pick_compile
from dirl_cli.training.optim import Optim
from dirl_cli.types import SHARDED_LAUNCHES, Decoding, Trajectory

UPDATE = ("micro_rows", "gradient_checkpointing", "context_parallel", "row_tokens", "decoding.max_new_tokens")
TIMED = ("compile", "eval_problems", "eval_every")
GPUS = (2, 4, 8)  # of one machine
ADAPTERS = ("lora", "qlora")
PROMPT = 1024  # tokens of prompts of which nothing is known
NOT_TIMED = "loading, compiling and saving"
LEAST = 64  # tokens of a row, a demonstration or an answer that are worth proposing


@dataclass(frozen=True)
class TrainingSetup:
    """What is trained, how and on which machine, in fine-tuning, RL and DPO alike.

    lm: the model, without its weights. settings: those named in FINETUNE or RL. adapter: makes the choices of `peft`
    that may be proposed instead, by name; None if there is nothing else to propose. assumptions: of how long it takes.
    """

    lm: DiffusionLM
    optim: Optim
    machine: Machine
    settings: Settings
    peft: Peft = FullFinetune()
    adapter: Callable[[str], Peft] | None = None
    assumptions: Assumptions = NOTHING_ASSUMED


class Forecast(Protocol):
    """What a run will hold and compute under any settings."""

    @property
    def setup(self) -> TrainingSetup: ...
    @property
    def memories(self) -> "MemoryByPeft": ...
    def phases(self, settings: Settings) -> dict[str, Bytes]: ...
    def duration(self, settings: Settings) -> Duration: ...
    def time(self, settings: Settings, device: Device) -> TimePlan: ...


def budget_of(forecast: Forecast, knobs: Mapping[str, Sequence[Any]], facts: str) -> Budget:
    """What a forecast comes to under the settings of its run. knobs, facts: see `Budget`."""
    setup = forecast.setup
    device = setup.assumptions.device
    return Budget(
        forecast.phases,
        setup.settings,
        knobs,
        setup.machine,
        facts + host_facts(forecast.memories.of(setup.settings)),
        alternatives=alternatives(setup, forecast.memories.critic),
        duration=forecast.duration(setup.settings),
        time=forecast.time(setup.settings, device) if device else None,
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
            context=settings.get("context_parallel", 1),
            critic=settings.get("critic", self.critic) == "model",
            products=settings.get("rollout.products") or "auto",
        )

    def _count(self, peft: Peft) -> Memory:
        machine = self.setup.machine
        base_dtype = peft.base_dtype(machine.dtype, machine.kind)
        attention = pick_attention(machine.attention, machine.kind)
        return Memory(
            architecture(self.setup.lm.model.config, self.setup.optim, peft, base_dtype),
            bf16=pick_dtype(machine.dtype, machine.kind) == torch.bfloat16,
            dense=attends_densely(self.setup.lm, machine),
            tiled=attention == TILES,
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


def attends_densely(lm: DiffusionLM, machine: Machine) -> bool:
    """Whether attention takes a dense mask."""
    attention = pick_attention(machine.attention, machine.kind)
    return fitting_attention(lm.model.config, attention, machine.kind) == "sdpa"


def loading_phase(memory: Memory) -> dict[str, Bytes]:
    """A phase of its own where processes will share the model, which they do from its first layer on."""
    return {"loading": memory.loading()} if memory.parallelism.gathers else {}


def host_facts(memory: Memory) -> str:
    """What is held beside the GPUs of processes that share a model, in words, as a further line; else nothing."""
    if not (memory.cuda and memory.parallelism.gathers):
        return ""
    loaded = format_bytes(memory.loaded())
    written = format_bytes(memory.value * memory.model.parameters)
    return f"\nbeside its GPU the first process holds {loaded} while the model is loaded, {written} while it is written"


def update_phase(memory: Memory, batch: MicroBatch, settings: Settings, scoring: int = SCORING) -> Bytes:
    """What an update holds. scoring: bytes of each logit that is scored."""
    return replace(memory, checkpointing=settings["gradient_checkpointing"]).update(batch, scoring)


def update_times(
    memory: Memory,
    batch: MicroBatch,
    work: Work,
    count: int,
    device: Device,
    compiled: bool,
    scorings: int = 0,
    optimizer_steps: int = 1,
    epochs: int = 1,
) -> dict[str, float]:
    """Seconds of the parts of a step's updates, as a run's metrics call them.

    work: of all that the step learns from, which `count` processes share. scorings: forwards of it without a backward.
    """
    own = work.times(1 / count)
    micro_batches = math.ceil(own.tokens * memory.context / (batch.rows * batch.width))  # of which each has a slice
    phases = {"rows": rows_seconds(own.tokens)}
    if scorings:
        phases["logprobs"] = scorings * forward_seconds(memory.model, own, device, compiled)
    of_epoch = backpropagation_seconds(memory, own, micro_batches, count, device, compiled)
    phases["backpropagation"] = epochs * of_epoch
    phases["optimizer"] = optimizer_steps * optimizer_seconds(memory, device)
    return phases


def compiles_layers(settings: Settings, machine: Machine) -> bool:
    """Whether layers are compiled for learning."""
    return pick_compile(settings["compile"], machine.kind)


def evaluations(settings: Settings, before: bool) -> int:
    """How often a run is measured. before: also before its first step."""
    steps, every = settings["steps"], settings["eval_every"]
    count = 1 + int(before)
    if every:
        count += (steps - 1) // every
    return count


def rollout_phase(
    memory: Memory,
    slots: int,
    prompt: int,
    lm: DiffusionLM,
    machine: Machine,
    decoding: Decoding,
    settings: Settings,
) -> Bytes:
    """What the native engine holds. slots: answers at once. prompt: tokens of the longest."""
    longest = with_answer(prompt, lm, settings)
    if not memory.cuda:
        return memory.rollout(slots, prompt, longest, lm.block_size, decoding)
    share = settings.get("rollout.cache_share") or NativeSampler(lm).cache_share
    return memory.rollout(slots, prompt, longest, lm.block_size, decoding, machine.free_bytes(), share)


def cached_tokens(memory: Memory, phase: Bytes, slots: int) -> str:
    """How many tokens' keys and values the native engine has room for, in words. phase: what `rollout_phase` says."""
    tokens = phase["KV cache"] // memory.token_bytes
    return f"keys and values of {tokens:,} tokens, which is {tokens // slots:,} for each of {slots} at once"


def filled_slots(settings: Settings, answers: int) -> int:
    """How many answers a process samples at once, of those that it has to, if memory suffices."""
    return int(min(settings["rollout.max_batch"], answers))


def answers_at_once(memory: Memory, phase: Bytes, slots: int, prompt: int, length: int) -> int:
    """How many answers of that length run at once where keys and values have no room for `slots` of them.

    length: tokens of an answer, of which half are there in the mean.
    """
    tokens = phase["KV cache"] // memory.token_bytes
    return max(min(slots, tokens // (prompt + length // 2 + 1)), 1)


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
    count = processes(settings, machine) // settings.get("context_parallel", 1)
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


def cache_shares(engine: Engine | None, machine: Machine) -> list[float]:
    """What may be proposed for `rollout.cache_share`, which counts on a GPU."""
    if machine.kind != "cuda" or not isinstance(engine, (Lmdeploy, Native)):
        return []
    return [engine.cache_share / 2, engine.cache_share / 4]


def update_knobs(settings: Settings, batch: MicroBatch) -> dict[str, Sequence[Any]]:
    """What makes an update smaller, the result the same: fewer rows, less kept of each layer, shorter rows."""
    return {
        "micro_rows": halvings(batch.rows, 1),
        "gradient_checkpointing": [] if settings["gradient_checkpointing"] is True else [True],
        "row_tokens": halvings(settings["row_tokens"], LEAST),
    }


def sharding_knobs(settings: Settings, machine: Machine) -> dict[str, Sequence[Any]]:
    """What makes each of several processes take less: that they share the model."""
    can_shard = machine.gpus > 1 and settings["launch"] != "fsdp2"
    return {"launch": ["fsdp2"] if can_shard else []}


def alternatives(setup: TrainingSetup, critic: str) -> list[list[Settings]]:
    """Other ways to train the same model, each from the least change on: more GPUs that share it, and adapters.

    critic: none, head or model. More GPUs that share the policy are not proposed with a critic, since a head, which may
    be, could not be there.
    """
    ways: list[list[Settings]] = []
    if setup.machine.kind == "cuda" and critic == "none":
        ways.append([{"gpus": count, "launch": "fsdp2"} for count in GPUS if count > setup.machine.gpus])
    if setup.adapter and isinstance(setup.peft, FullFinetune):
        ways.append([adapter_change(name, setup.settings["launch"], critic) for name in ADAPTERS])
    return ways


def adapter_change(name: str, launch: str, critic: str) -> Settings:
    """The settings with which an adapter is trained instead of all parameters. launch, critic: what they are now."""
    changes = {"peft": name}
    if critic == "model":  # with an adapter there is no second model, nor with a model that is shared a head
        changes["critic"] = "head"
        changes["launch"] = "auto" if launch in SHARDED_LAUNCHES else launch
    return changes
