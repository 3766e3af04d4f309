"""What `dirl sft` is going to take, from its settings and the lengths of its demonstrations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import Strip
from dirl_cli.diffusion.masking import Masking, example, noised_strip
from dirl_cli.diffusion.reveal_order import TraceWindows
from dirl_cli.plan.budget import Budget, Settings, halvings
from dirl_cli.plan.devices import NATIVE, Device
from dirl_cli.plan.duration import SMALL, Duration, update_operations
from dirl_cli.plan.forecast import (
    LEAST,
    NOT_TIMED,
    TIMED,
    UPDATE,
    MemoryByPeft,
    TrainingSetup,
    budget_of,
    compiles_layers,
    evaluations,
    loading_phase,
    micro_batch_of,
    processes,
    rollout_phase,
    sharding_knobs,
    update_knobs,
    update_phase,
    update_times,
    with_answer,
)
from dirl_cli.plan.memory import SCORING, Bytes, Memory, MicroBatch
from dirl_cli.plan.time import (
    Answers,
    TimePlan,
    Work,
    mean_steps,
    mean_work,
    push_seconds,
    rows_seconds,
    sampling_seconds,
)
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding

FINETUNE = (*UPDATE, *TIMED, "steps", "launch", "batch_size", "max_tokens")
EXAMPLES = 32  # demonstrations laid out to know what the mean one takes


def sft_budget(
    setup: TrainingSetup,
    masking: Masking | TraceWindows,
    decoding: Decoding,
    lengths: NDArray[np.int64],
    prompts: Sequence[Sequence[int]],
    known: bool = True,
    scoring: int = SCORING,
) -> Budget:
    """Memory budget of an SFT run.

    lengths: tokens of each demonstration (N,). prompts: token ids of each problem that may be answered meanwhile, in
    order. known: whether the lengths are; else they are the longest there may be, and the mean is assumed.
    scoring: bytes of each logit that is scored.

    An answer whose every state is learned from is taken to have been written token by token, the most states there are.
    """
    typical = lengths
    if not known and setup.assumptions.length:
        typical = np.minimum(lengths, setup.assumptions.length)
    forecast = FinetuneForecast(
        setup,
        partial(demonstration_batch, setup, masking, lengths),
        partial(demonstration_work, setup, masking, typical),
        decoding,
        prompts,
        MemoryByPeft(setup),
        scoring,
        "tiny_sft",
        is_bound=has_most_states(masking) or (not known and not setup.assumptions.length),
        learned=f"demonstrations of {typical.mean():,.0f} tokens",
    )
    return finetune_budget(forecast)


def has_most_states(masking: Masking | TraceWindows) -> bool:
    """Whether an answer of which no order is known has more states than any that was sampled."""
    return isinstance(masking, TraceWindows) and masking.states == "every"


def demonstration_batch(
    setup: TrainingSetup, masking: Masking | TraceWindows, lengths: NDArray[np.int64], settings: Settings
) -> MicroBatch:
    """The largest micro-batch: steps of demonstrations of average length, rows that the longest fits into."""
    lm = setup.lm
    lengths = lengths[lengths <= max(settings["max_tokens"], lengths.min())]
    longest = int(lengths.max())
    demonstration = example([0] * longest, [True] * longest, lm.block_size, lm.pad_token_id)
    strip = noised_strip(demonstration, masking, lm.block_size, lm.mask_token_id, generator(0))
    strips = settings["batch_size"] * float(lengths.mean()) / longest
    return micro_batch_of(strip, strips, settings, setup.machine)


def demonstration_work(
    setup: TrainingSetup, masking: Masking | TraceWindows, lengths: NDArray[np.int64], settings: Settings
) -> Work:
    """What a step on as many demonstrations computes in the mean, all of each hidden by the schedule."""
    lm = setup.lm
    lengths = np.sort(lengths[lengths <= max(settings["max_tokens"], lengths.min())])
    strips: list[Strip] = []
    for part in np.array_split(lengths, min(EXAMPLES, len(lengths))):
        length = round(float(part.mean()))
        demonstration = example([0] * length, [True] * length, lm.block_size, lm.pad_token_id)
        strips.append(noised_strip(demonstration, masking, lm.block_size, lm.mask_token_id, generator(len(strips))))
    return mean_work(strips, lm.block_size).times(settings["batch_size"])


def finetune_budget(forecast: "FinetuneForecast") -> Budget:
    """Memory budget of a run that learns from rows of its own."""
    setup = forecast.setup
    settings = setup.settings
    batch = forecast.batch(settings)
    # Keys first whose change costs least: evaluation and long rows go last.
    knobs = {
        **sharding_knobs(settings, setup.machine),
        **update_knobs(settings, batch),
        "eval_problems": halvings(settings["eval_problems"], 1),
        "max_tokens": halvings(settings["max_tokens"], LEAST),
    }
    return budget_of(forecast, knobs, facts=f"{forecast.memories.of({})}\nabout {batch}")


@dataclass(frozen=True)
class FinetuneForecast:
    """What the phases of a run on demonstrations or pairs hold under any settings.

    batch: its largest micro-batch. work: what a step computes in the mean. prompts: see `sft_budget`. scoring: bytes of
    each logit that is scored. preset: the experiment for a model as small as the embedded one. is_bound: whether the
    work is the most there may be. learned: what it is taken to be of, in words. before: whether prompts are answered
    before the first step, too.
    """

    setup: TrainingSetup
    batch: Callable[[Settings], MicroBatch]
    work: Callable[[Settings], Work]
    decoding: Decoding
    prompts: Sequence[Sequence[int]]
    memories: MemoryByPeft
    scoring: int
    preset: str
    is_bound: bool
    learned: str
    before: bool = False

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
        setup = self.setup
        return rollout_phase(replace(memory, samples=True), slots, longest, setup.lm, setup.machine, greedy, settings)

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
            is_bound=self.is_bound,
            knobs="steps, batch_size or row_tokens",
            preset=self.preset if model.parameters < SMALL else None,
        )

    def time(self, settings: Settings, device: Device) -> TimePlan:
        """Seconds of a step's parts, evaluations divided among all steps."""
        setup = self.setup
        memory = replace(self.memories.of(settings), checkpointing=settings["gradient_checkpointing"])
        count = processes(settings, setup.machine)
        work = self.work(settings)
        scorings = int(self.memories.reference)
        phases = update_times(
            memory, self.batch(settings), work, count, device, compiles_layers(settings, setup.machine), scorings
        )
        # Every process makes the rows of all, while it learns from those of the step before.
        phases["rows"] = max(0.0, rows_seconds(work.tokens) - phases["backpropagation"])
        assumed = self.learned
        rates = {"learned from": work.tokens / sum(phases.values())}

        if evaluated := self.prompts[: settings["eval_problems"]]:
            length = with_answer(0, setup.lm, settings)
            length = min(setup.assumptions.length or length, length)
            answers = math.ceil(len(evaluated) / count)
            steps = mean_steps(setup.assumptions, self.decoding, setup.lm.block_size, NATIVE)
            prompt = sum(map(len, evaluated)) // len(evaluated)
            slots = min(NativeSampler(setup.lm).max_batch, answers)
            greedy = Answers(answers, answers, slots, prompt, length, steps)
            seconds = push_seconds(memory, count, device)
            seconds += sampling_seconds(memory.model, greedy, setup.lm.block_size, NATIVE, device)
            phases["evaluation"] = seconds * evaluations(settings, self.before) / settings["steps"]
            assumed += f"; in evaluations answers of {length:,} tokens"
        return TimePlan(
            phases,
            settings["steps"],
            count,
            device,
            rates,
            self.is_bound,
            assumed,
            f"{NOT_TIMED}, and held-out losses",
            setup.assumptions.price_per_gpu_hour,
        )
