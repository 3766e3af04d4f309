"""What `dirl eval` is going to take: a model that learns nothing, and as many answers as are asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from dirl_cli.models.attention_cpu import TILES
from dirl_cli.models.load import DiffusionLM, pick_attention, pick_dtype
from dirl_cli.plan.architecture import architecture
from dirl_cli.plan.budget import Budget, Machine, Settings, halvings
from dirl_cli.plan.devices import LMDEPLOY, NATIVE, Device
from dirl_cli.plan.forecast import (
    LEAST,
    answers_at_once,
    attends_densely,
    cache_shares,
    cached_tokens,
    filled_slots,
    rollout_phase,
    with_answer,
)
from dirl_cli.plan.memory import Bytes, Memory
from dirl_cli.plan.time import Answers, Assumptions, TimePlan, describe_answers, is_most, mean_steps, sampling_seconds
from dirl_cli.rollout.engines import Engine, Lmdeploy, Native
from dirl_cli.text import counted
from dirl_cli.types import Decoding

EVAL = ("rollout.max_batch", "rollout.cache_share", "rollout.products", "decoding.max_new_tokens")


class NoOptim:
    """No optimizer, where nothing is learned."""

    def build(self, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
        return []


def eval_budget(
    lm: DiffusionLM,
    machine: Machine,
    settings: Settings,
    engine: Engine,
    decoding: Decoding,
    prompts: Sequence[Sequence[int]],
    samples: int,
    assumptions: Assumptions,
) -> Budget:
    """Budget of an evaluation.

    lm: the model, without its weights. settings: those of EVAL. prompts: token ids of each problem. samples: answers
    to each.
    """
    dtype = pick_dtype(machine.dtype, machine.kind)
    attention = pick_attention(machine.attention, machine.kind)
    memory = Memory(
        replace(architecture(lm.model.config, NoOptim(), dtype=dtype), trained=0),
        bf16=dtype == torch.bfloat16,
        dense=attends_densely(lm, machine),
        tiled=attention == TILES,
        cuda=machine.kind == "cuda",
    )
    forecast = EvalForecast(lm, machine, memory, engine, decoding, prompts, samples, assumptions)
    knobs: dict[str, Sequence[Any]] = {
        "rollout.cache_share": cache_shares(engine, machine),
        "rollout.max_batch": halvings(settings["rollout.max_batch"], 1),
        "rollout.products": ["plain"] if isinstance(engine, Native) and engine.products != "plain" else [],
        "decoding.max_new_tokens": halvings(settings["decoding.max_new_tokens"], LEAST),
    }
    facts = f"{memory}\n{counted(len(prompts) * samples, 'answer')} to {counted(len(prompts), 'problem')}"
    if isinstance(engine, Native) and memory.cuda:
        slots = filled_slots(settings, forecast.problems * samples)
        facts += f"\n{cached_tokens(memory, forecast.phases(settings)['sampling'], slots)}"
    return Budget(
        forecast.phases,
        settings,
        knobs,
        machine,
        facts,
        time=forecast.time(settings, assumptions.device) if assumptions.device else None,
        parameters=memory.model.parameters,
        learns=False,
    )


@dataclass(frozen=True)
class EvalForecast:
    """What an evaluation holds and computes under any settings. The fields are `eval_budget`'s parameters."""

    lm: DiffusionLM
    machine: Machine
    memory: Memory
    engine: Engine
    decoding: Decoding
    prompts: Sequence[Sequence[int]]
    samples: int
    assumptions: Assumptions

    def phases(self, settings: Settings) -> dict[str, Bytes]:
        """What sampling holds, all at its most."""
        slots = filled_slots(settings, self.problems * self.samples)
        if isinstance(self.engine, Lmdeploy):
            tokens = slots * self.lm.block_size
            share = settings["rollout.cache_share"]
            return {"sampling": self.memory.lmdeploy(self.machine.free_bytes(), share, tokens, self.decoding)}
        memory = replace(self.memory, products=settings["rollout.products"] or "auto")
        longest = max(map(len, self.prompts))
        return {"sampling": rollout_phase(memory, slots, longest, self.lm, self.machine, self.decoding, settings)}

    def time(self, settings: Settings, device: Device) -> TimePlan:
        """Seconds of sampling, while which answers are graded."""
        speed = LMDEPLOY if isinstance(self.engine, Lmdeploy) else NATIVE
        prompt = sum(map(len, self.prompts)) // len(self.prompts)
        most = with_answer(prompt, self.lm, settings) - prompt
        length = min(self.assumptions.length or most, most)
        steps = mean_steps(self.assumptions, self.decoding, self.lm.block_size, speed)
        count = self.problems * self.samples
        slots = filled_slots(settings, self.problems * self.samples)
        if isinstance(self.engine, Native):
            slots = answers_at_once(self.memory, self.phases(settings)["sampling"], slots, prompt, length)
        answers = Answers(count, self.problems, slots, prompt, length, steps)
        seconds = sampling_seconds(self.memory.model, answers, self.lm.block_size, speed, device)
        return TimePlan(
            {"sampling": seconds},
            1,
            self.machine.gpus,
            device,
            {"sampled": len(self.prompts) * self.samples * length / seconds},
            is_most(self.assumptions, self.decoding),
            describe_answers(self.assumptions, self.decoding, length, steps, self.lm.block_size, speed),
            "loading, slow grading, and the end, when few long answers are left",
            self.assumptions.price_per_gpu_hour,
            is_whole=True,
        )

    @property
    def problems(self) -> int:
        """Of each process."""
        return math.ceil(len(self.prompts) / self.machine.gpus)
