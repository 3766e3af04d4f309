"""How long the phases of a step take on a GPU: what each computes and moves, over what the device does in a second.

    forward of rows         F = 2 (tokens × layer weights + scored × head weights) + 4 × layers × queries × keys seen
    forward and backward    3 F / (share × operations); 4 F with gradient checkpointing; an adapter spares one F
    forward of a sampler    layers × overhead + product(body) + product(head) + (KV cache + logits) / bandwidth,
                            product(of N weights for n tokens) = max(2 N / bandwidth, 2 N n / (share × operations))
    optimizer, push         bytes / bandwidth

The weights of layers are those that a token is multiplied with, a mixture's chosen experts alone. What the devices do
and the shares are in devices.py; how near this comes to what was measured is in tests/plan/test_time.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from dirl_cli.diffusion.layout import Strip
from dirl_cli.plan.architecture import Architecture
from dirl_cli.plan.devices import (
    COMPILED,
    LMDEPLOY_ASLEEP,
    LMDEPLOY_AWAKE,
    PUSH_A_LAYER,
    ROW_TOKENS,
    TRAINING,
    Device,
    EngineSpeed,
)
from dirl_cli.plan.duration import format_duration
from dirl_cli.plan.memory import Memory
from dirl_cli.text import counted
from dirl_cli.types import Decoding, Trajectory


@dataclass(frozen=True)
class Work:
    """What a forward of rows computes: tokens, those of them that are scored, and the keys that all of them see."""

    tokens: float
    scored: float
    keys: float

    def times(self, factor: float) -> "Work":
        """So many times the same."""
        return Work(factor * self.tokens, factor * self.scored, factor * self.keys)


def work_of(strip: Strip, block_size: int) -> Work:
    """What a strip takes: each of its tokens sees the clean blocks before its own, and that."""
    keys = (strip.position // block_size + 1) * block_size  # (n,)
    return Work(len(strip), len(strip.target_index), float(keys.sum()))


def mean_work(strips: Sequence[Strip], block_size: int) -> Work:
    """What a strip takes on average."""
    each = [work_of(strip, block_size) for strip in strips]
    total = Work(sum(w.tokens for w in each), sum(w.scored for w in each), sum(w.keys for w in each))
    return total.times(1 / len(strips))


def group_work(strip: Strip, prompt: int, answers: int, block_size: int) -> Work:
    """What answers to one prompt take, whose whole blocks stand once. strip: of one of them. prompt: its tokens."""
    shared = (strip.view == 0) & (strip.position < prompt // block_size * block_size)  # (n,)
    keys = (strip.position[shared] // block_size + 1) * block_size
    spared = Work(float(shared.sum()), 0.0, float(keys.sum())).times(answers - 1)
    total = work_of(strip, block_size).times(answers)
    return Work(total.tokens - spared.tokens, total.scored, total.keys - spared.keys)


def mean_trajectory(prompt: int, answer: int, steps: float, block_size: int) -> Trajectory:
    """An answer of so many tokens whose blocks took `steps` denoising steps in the mean, each one step more or less."""
    first = prompt // block_size
    end = -(-(prompt + answer) // block_size)
    reveal_step: list[int] = []
    for block in range(first, end):
        number = block - first
        of_block = max(1, int((number + 1) * steps + 1e-9) - int(number * steps + 1e-9))
        reveal_step += [i * of_block // block_size + 1 for i in range(block_size)]
    reveal_step = reveal_step[prompt % block_size :]
    return Trajectory([0] * prompt, [0] * len(reveal_step), reveal_step)


@dataclass(frozen=True)
class Assumptions:
    """What a plan of time takes for granted.

    device: None where nothing is known of it. length: tokens of a mean answer; None for as many as it may have.
    tokens_per_forward: of a sampler; None for as few as the decoding may reveal. source: where these two come from.
    price_per_gpu_hour: in any currency.
    """

    device: Device | None = None
    length: int | None = None
    tokens_per_forward: float | None = None
    source: str = ""
    price_per_gpu_hour: float | None = None


NOTHING_ASSUMED = Assumptions()


# Parts of a step, in seconds


def layer_weights(model: Architecture) -> int:
    """Weights of the layers that a token is multiplied with: queries, keys, values, output, and three of the MLP."""
    of_layer = 2 * model.hidden * (model.queries + model.keys) + 3 * model.hidden * model.inner
    return model.layers * of_layer


def forward_operations(model: Architecture, work: Work) -> float:
    """F: see the head of this file. Keys seen count twice, in the scores and in what is added up by them."""
    products = work.tokens * layer_weights(model) + work.scored * model.vocabulary * model.hidden
    return 2.0 * products + 4.0 * model.layers * model.queries * work.keys


def forward_seconds(model: Architecture, work: Work, device: Device, compiled: bool) -> float:
    """Seconds of a forward that nothing is learned from."""
    share = COMPILED if compiled else TRAINING
    return forward_operations(model, work) / (share * device.operations)


def backpropagation_seconds(
    memory: Memory, work: Work, micro_batches: float, processes: int, device: Device, compiled: bool
) -> float:
    """Seconds of one process's forwards and backwards of an optimizer step. work: of the process."""
    model = memory.model
    passes = 3
    if not model.is_full_finetune:
        passes = 2  # frozen weights have no gradient
    computing = passes * forward_seconds(model, work, device, compiled)

    # What is not kept is computed again; attention's output is, where layers are compiled and nobody shares them.
    if memory.checkpointing:
        keeps_attention = memory.checkpointing == "attention" and compiled and not memory.parallelism.gathers
        again = replace(work, keys=0) if keeps_attention else work
        computing += forward_seconds(model, again, device, compiled)

    # Weights in fp32 are read and cast once a micro-batch, their gradients read, and added to those in fp32.
    if memory.casts_weights:
        weights = model.layer_parameters + model.vocabulary * model.hidden
        computing += micro_batches * weights * (4 + 2 + 2 + 4 + 4) / device.bandwidth
    if processes == 1:
        return computing

    # Shared parameters come, a layer ahead, for every forward and with FSDP2 for every backward, and gradients go;
    # unshared gradients go there and back once.
    others = (processes - 1) / processes
    if memory.parallelism.gathers:
        times = 2 if memory.parallelism.keeps_gathered else 3
        travelling = micro_batches * times * 4 * model.parameters * others / device.link
        return max(computing, travelling)
    return computing + 2 * 4 * model.trained * others / device.link


def optimizer_seconds(memory: Memory, device: Device) -> float:
    """Seconds of one process's clipping and fused step: gradients are read thrice and written once, parameters and
    states read and written. Muon's own products are left out.
    """
    gradients = 4 * 4 * memory.model.trained / memory.parallelism.gradients
    parameters = 2 * 4 * memory.model.trained / memory.parallelism.parameters
    states = 2 * memory.model.state_bytes / memory.parallelism.states
    return (gradients + parameters + states) / device.bandwidth


def rows_seconds(tokens: float) -> float:
    """Seconds in which a process lays out rows of so many tokens."""
    return tokens / ROW_TOKENS


def push_seconds(memory: Memory, processes: int, device: Device) -> float:
    """Seconds in which the native engine is given the policy's weights: casts of them, or of merged ones."""
    casts = 3 * memory.linear_copies() + 2 * memory.model.merged_bytes  # fp32 is read and bf16 written
    seconds = PUSH_A_LAYER * memory.model.layers + casts / device.bandwidth
    if memory.parallelism.gathers:
        seconds += 4 * memory.model.parameters * (processes - 1) / processes / device.link
    return seconds


def lmdeploy_push_seconds(memory: Memory, stays_awake: bool) -> float:
    """Seconds in which LMDeploy is given the policy's weights; unless it stays awake, with going to sleep for an update
    and waking up after it.
    """
    return 2 * memory.model.parameters / (LMDEPLOY_AWAKE if stays_awake else LMDEPLOY_ASLEEP)


FIXED = ("sequential", "low_confidence_static")  # strategies that say how many steps a block takes


@dataclass(frozen=True)
class Answers:
    """What a process samples: so many answers to so many prompts, `slots` of them at once.

    prompt, length: tokens of a prompt and an answer. steps: denoising forwards of a block, in the mean.
    """

    count: float
    prompts: float
    slots: int
    prompt: int
    length: int
    steps: float


def mean_steps(assumptions: Assumptions, decoding: Decoding, block_size: int, engine: EngineSpeed) -> float:
    """Denoising steps of a mean block: as the strategy has it, as assumed, or else the most there may be."""
    most = min(decoding.denoising_steps or block_size, block_size)
    if decoding.strategy in FIXED or not assumptions.tokens_per_forward:
        return most
    forwards = block_size / assumptions.tokens_per_forward
    if not engine.fuses_commits:
        forwards -= 1  # which cached the block
    return min(max(forwards, 1.0), most)


def sampling_seconds(
    model: Architecture, answers: Answers, block_size: int, engine: EngineSpeed, device: Device
) -> float:
    """Seconds in which a process samples its answers. Slots are taken to be full until the last answer ends."""
    batch = answers.slots
    if not answers.count:
        return 0.0
    forwards = answers.count / batch * -(-answers.length // block_size) * answers.steps
    if not engine.fuses_commits:
        forwards *= (answers.steps + 1) / answers.steps
    context = answers.prompt + answers.length / 2
    prefill = prefill_seconds(model, answers.prompts, answers.prompt, engine, device)
    return prefill + forwards * decoding_seconds(model, batch, answers.steps, context, block_size, engine, device)


def prefill_seconds(model: Architecture, texts: float, tokens: int, engine: EngineSpeed, device: Device) -> float:
    """Seconds in which the keys and values of so many texts of so many tokens are computed."""
    work = Work(texts * tokens, 0.0, texts * tokens**2 / 2)
    return forward_operations(model, work) / (engine.share * device.operations)


def decoding_seconds(
    model: Architecture,
    batch: float,
    steps: float,
    context: float,
    block_size: int,
    engine: EngineSpeed,
    device: Device,
) -> float:
    """Seconds of the mean forward of a sampler. batch: answers at once. context: tokens of each that are cached."""
    # Where a commit is fused, one forward in `steps` has as many tokens again; half of them are masked, and scored.
    tokens = batch * block_size
    scored = tokens
    if engine.fuses_commits:
        tokens *= (steps + 1) / steps
        scored = tokens / 2

    weights = layer_weights(model)
    read = min(model.layer_parameters, weights * tokens)  # of a mixture, the experts that some token goes to
    head = model.vocabulary * model.hidden
    body_seconds = product_seconds(weights, read, tokens, engine, device)
    head_seconds = product_seconds(head, head, scored, engine, device)

    cached = batch * context * model.layers * 2 * model.keys * 2
    logits = 4 * scored * model.vocabulary
    overhead = model.layers * engine.seconds_a_layer
    return overhead + body_seconds + head_seconds + (cached + logits) / device.bandwidth


def product_seconds(weights: float, read: float, tokens: float, engine: EngineSpeed, device: Device) -> float:
    """Seconds of tokens' products with weights, the longer of reading and computing. read: weights, in bf16."""
    return max(2 * read / device.bandwidth, 2 * weights * tokens / (engine.share * device.operations))


# What is said of it


def is_most(assumptions: Assumptions, decoding: Decoding) -> bool:
    """Whether sampling as assumed takes as long as it may: where no answer's length, or no speed, is given."""
    knows_steps = decoding.strategy in FIXED or assumptions.tokens_per_forward is not None
    return not (knows_steps and assumptions.length)


def describe_answers(
    assumptions: Assumptions, decoding: Decoding, length: int, steps: float, block_size: int, engine: EngineSpeed
) -> str:
    """What answers were taken to be, and from where that is."""
    forwards = steps if engine.fuses_commits else steps + 1
    answers = f"answers of {length:,} tokens, {block_size / forwards:.3g} a forward"
    missing = []
    if not assumptions.length:
        missing.append("plan.length")
    if not assumptions.tokens_per_forward and decoding.strategy not in FIXED:
        missing.append("plan.tokens_per_forward")
    if assumptions.source:
        answers += f", {assumptions.source}"
    if missing:
        answers += f" (without {' and '.join(missing)} as slow as may be)"
    return answers


SAMPLING = {"rollout", "evaluation", "sampling"}  # phases in which a sampler works


@dataclass(frozen=True)
class TimePlan:
    """The seconds of each phase of a run's step.

    phases: seconds by name, in order. rates: what is said of tokens a second, such as `{"sampled": 512.0}`.
    is_bound: whether these are the most there may be. assumed: what was taken for granted, in words.
    left_out: what is not in it, likewise. is_whole: whether the phases are of a whole evaluation, not of a step.
    """

    phases: Mapping[str, float]
    steps: int
    gpus: int
    device: Device
    rates: Mapping[str, float]
    is_bound: bool
    assumed: str
    left_out: str
    price_per_gpu_hour: float | None = None
    is_whole: bool = False

    @property
    def step_seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def gpu_hours(self) -> float:
        return self.step_seconds * self.steps * self.gpus / 3600

    def table(self) -> Table:
        """The seconds as a row for each phase."""
        table = Table("time" if self.is_whole else "time of a step", box=None, padding=(0, 2, 0, 0))
        table.add_column("seconds", justify="right")
        table.add_column("share", justify="right")
        for name, seconds in self.phases.items():
            table.add_row(name, format_seconds(seconds), f"{100 * seconds / self.step_seconds:.0f} %")
        table.add_row("together", format_seconds(self.step_seconds), "", style="bold")
        return table

    def lines(self) -> list[str]:
        """What the run takes in all, what was taken for granted, and how far to believe it."""
        most = "at most" if self.is_bound else "about"
        gpus = self.device.name if self.gpus == 1 else f"{self.gpus} × {self.device.name}"
        run = "all" if self.is_whole else counted(self.steps, "step")
        total = f"{run} on {gpus}: {most} {format_total(self.step_seconds * self.steps)}"
        total += f", {format_hours(self.gpu_hours)} GPU-hours"
        if self.price_per_gpu_hour is not None:
            price = self.price_per_gpu_hour
            total += f", {self.gpu_hours * price:,.2f} at {price:g} a GPU-hour"
        rates = " · ".join(f"{rate:,.0f} tokens/s {name}" for name, rate in self.rates.items())
        return [total, rates, f"taken for granted: {self.assumed}", self.trust(), f"not in it: {self.left_out}"]

    def trust(self) -> str:
        """How far to believe the seconds."""
        if not self.device.is_measured:
            return (
                f"{self.device.name} is by its data sheet, at the shares of it that an H100 gave: nobody has tried it,"
                " so let the first steps tell"
            )
        trust = "h100 is measured, of a model of 1.7B on one GPU: its seconds are met within a factor of 1.3"
        if self.gpus > 1:
            trust += "; what travels between GPUs is by the data sheet"
        if SAMPLING & self.phases.keys():
            trust += "; the native engine was measured before its kernels were fused, and may be faster now"
        return trust


def no_time(kind: str) -> str:
    """Why there are no seconds, and no price. kind: of the device, cuda or cpu."""
    if kind == "cpu":
        return "how long each phase takes is known of GPUs only: give plan.device=h100 for one's"
    if torch.cuda.is_available():
        return f"nothing is known of how fast {torch.cuda.get_device_name()} is: give the nearest, as plan.device=h100"
    return "say which GPU it is to be for its seconds, as in plan.device=h100"


def format_seconds(seconds: float) -> str:
    """Seconds in three digits or more: 0.00285, 1.20, 412."""
    if seconds >= 100:
        return f"{seconds:,.0f}"
    return f"{seconds:#.3g}"


def format_hours(hours: float) -> str:
    """Hours such as 0.034, 0.4, 7.9, 1,234."""
    if hours >= 10:
        return f"{hours:,.0f}"
    return f"{hours:.1f}" if hours >= 0.1 else f"{hours:.2g}"


def format_total(seconds: float) -> str:
    """A duration such as `45 seconds`, `20 minutes`, `3 hours`."""
    return f"{seconds:.0f} seconds" if seconds < 120 else format_duration(seconds)
