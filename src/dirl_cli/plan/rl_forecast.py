"""What `dirl rl` is going to take, from its settings: answers are as long as they may be, in as many steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dirl_cli.data.order import generator
from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.plan.budget import Budget, Settings, halvings
from dirl_cli.plan.devices import LMDEPLOY, NATIVE, Device
from dirl_cli.plan.duration import SMALL, Duration, sampling_operations, update_operations
from dirl_cli.plan.forecast import (
    LEAST,
    NOT_TIMED,
    TIMED,
    UPDATE,
    MemoryByPeft,
    TrainingSetup,
    answers_at_once,
    budget_of,
    cache_shares,
    cached_tokens,
    compiles_layers,
    evaluations,
    filled_slots,
    loading_phase,
    micro_batch_of,
    overlapping,
    processes,
    rollout_phase,
    sharding_knobs,
    update_knobs,
    update_phase,
    update_times,
    with_answer,
    worst_case_trajectory,
)
from dirl_cli.plan.memory import Bytes, Memory, MicroBatch, logit_bytes
from dirl_cli.plan.time import (
    Answers,
    TimePlan,
    Work,
    describe_answers,
    forward_seconds,
    group_work,
    is_most,
    lmdeploy_push_seconds,
    mean_steps,
    mean_trajectory,
    prefill_seconds,
    push_seconds,
    sampling_seconds,
)
from dirl_cli.rl.objective import Objective
from dirl_cli.rollout.engines import Engine, Lmdeploy, Native
from dirl_cli.types import SHARDED_LAUNCHES, Decoding

ROLLOUT = ("rollout.max_batch", "rollout.cache_share", "rollout.products", "rl.async_rollout")
SETTLED = ("rl.old", "rl.correction_cap")  # what the ratio's denominator takes
RL = (
    *UPDATE,
    *TIMED,
    *ROLLOUT,
    *SETTLED,
    "steps",
    "launch",
    "rl.problems",
    "rl.group_size",
    "rl.mini_batches",
    "rl.epochs",
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
    eval_prompts: Sequence[Sequence[int]] = (),
) -> Budget:
    """Memory budget of an RL run.

    All answers are taken to be as long as they may be, and revealed in as many steps as they may take.
    longest_prompt: tokens of it. engine: what samples; None where rollouts are read from files. learns: whether there
    are updates. teacher: parameters of a model to stay near that is not the one it begins as. critic: what learns
    values: none, head or model. eval_prompts: token ids of each problem that is answered in evaluations.
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
    forecast = RlForecast(setup, objective, decoding, longest_prompt, engine, learns, memories, eval_prompts)
    batch = forecast.batch(settings)
    # Processes share a critic that is a model, and do not one that is a layer: of two remedies the better.
    sharding = {} if critic == "head" else sharding_knobs(settings, setup.machine)
    is_shared = settings["launch"] in SHARDED_LAUNCHES or any(sharding.values())
    # Keys first whose change costs least: what makes answers shorter changes the result, and goes last.
    knobs = {
        **sharding,
        "rollout.cache_share": cache_shares(engine, setup.machine),
        "rollout.max_batch": halvings(settings["rollout.max_batch"], 1),
        "rollout.products": ["plain"] if isinstance(engine, Native) and engine.products != "plain" else [],
        **update_knobs(settings, batch),
        "critic": ["head"] if critic == "model" and not is_shared else [],
        "decoding.max_new_tokens": halvings(settings["decoding.max_new_tokens"], LEAST),
    }
    facts = f"{memories.of({})}\nat most {batch}"
    if isinstance(engine, Native) and setup.machine.kind == "cuda":
        memory = memories.of(settings)
        phase = forecast.rollout(memory, engine, settings)
        facts += f"\n{cached_tokens(memory, phase, forecast.slots(settings))}"
    return budget_of(forecast, knobs, facts)


def not_timed(ahead: int) -> str:
    """What a plan of seconds leaves out, in words. ahead: steps that are sampled ahead."""
    parts = [NOT_TIMED, "problems that are drawn anew"]
    if ahead < 2:  # beyond it no step waits for its longest answer
        parts.append("the end of a rollout, when few long answers are left")
    if ahead:
        parts.append("what it saves that a GPU samples while it learns, which is counted one after the other")
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"


@dataclass(frozen=True)
class RlForecast:
    """What the phases of an RL run hold under any settings. The fields are `rl_budget`'s parameters."""

    setup: TrainingSetup
    objective: Objective
    decoding: Decoding
    longest_prompt: int
    engine: Engine | None
    learns: bool
    memories: MemoryByPeft
    eval_prompts: Sequence[Sequence[int]] = ()

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
        if not phases:  # servers sample, and nothing is learned
            phases["rollout"] = memory.resident()
        if settings["rl.async_rollout"]:
            phases = {"update and rollout": overlapping(phases.values(), memory.resident())}
        return loading_phase(memory) | phases

    def rollout(self, memory: Memory, engine: Engine, settings: Settings) -> Bytes:
        """What is held while `engine` answers a process's problems."""
        slots = self.slots(settings)
        if isinstance(engine, Lmdeploy):
            free = self.setup.machine.free_bytes()
            tokens = slots * self.setup.lm.block_size
            return memory.lmdeploy(free, settings["rollout.cache_share"], tokens, self.decoding)
        setup = self.setup
        return rollout_phase(memory, slots, self.longest_prompt, setup.lm, setup.machine, self.decoding, settings)

    def slots(self, settings: Settings) -> int:
        """How many answers a process samples at once, if memory suffices: of as many steps as are sampled ahead."""
        problems = math.ceil(settings["rl.problems"] / processes(settings, self.setup.machine))
        steps = max(settings["rl.async_rollout"], 1)
        return filled_slots(settings, steps * problems * settings["rl.group_size"])

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

    def time(self, settings: Settings, device: Device) -> TimePlan:
        """Seconds of a step's parts, of one draw of problems, evaluations divided among all steps."""
        setup = self.setup
        block_size = setup.lm.block_size
        memory = replace(self.memories.of(settings), checkpointing=settings["gradient_checkpointing"])
        count = processes(settings, setup.machine)
        speed = LMDEPLOY if isinstance(self.engine, Lmdeploy) else NATIVE
        most = with_answer(self.longest_prompt, setup.lm, settings) - self.longest_prompt
        length = min(setup.assumptions.length or most, most)
        steps = mean_steps(setup.assumptions, self.decoding, block_size, speed)

        phases = {}
        rates = {}
        answers = settings["rl.problems"] * settings["rl.group_size"]
        if self.engine:
            problems = math.ceil(settings["rl.problems"] / count)
            slots = self.slots(settings)
            if isinstance(self.engine, Native):
                phase = self.rollout(memory, self.engine, settings)
                slots = answers_at_once(memory, phase, slots, self.longest_prompt, length)
            sampled = Answers(
                problems * settings["rl.group_size"],
                problems,
                slots,
                self.longest_prompt,
                length,
                steps,
            )
            phases["rollout"] = sampling_seconds(memory.model, sampled, block_size, speed, device)
            rates["sampled"] = answers * length / phases["rollout"]
        if self.learns:
            work = self.work(settings, length, steps)
            phases |= self.update_times(memory, work, settings, count, device)
            rates["learned from"] = work.tokens / sum(seconds for name, seconds in phases.items() if name != "rollout")
        if self.engine and self.learns:
            phases["push"] = self.push(memory, settings, count, device)
            if settings["rl.async_rollout"] > 1:  # what is under way gets its keys and values from new weights
                reached = self.longest_prompt + length // 2
                phases["push"] += prefill_seconds(memory.model, slots, reached, speed, device)
        if self.eval_prompts and self.learns:
            asked = math.ceil(len(self.eval_prompts) / count)
            prompt = sum(map(len, self.eval_prompts)) // len(self.eval_prompts)
            at_once = min(settings["rollout.max_batch"] or asked, asked)
            greedy = Answers(asked, asked, at_once, prompt, length, steps)
            seconds = sampling_seconds(memory.model, greedy, block_size, speed, device)
            phases["evaluation"] = seconds * evaluations(settings, before=True) / settings["steps"]

        return TimePlan(
            phases,
            settings["steps"],
            count,
            device,
            rates,
            is_most(setup.assumptions, self.decoding),
            describe_answers(setup.assumptions, self.decoding, length, steps, block_size, speed),
            not_timed(settings["rl.async_rollout"] if self.engine else 0),
            setup.assumptions.price_per_gpu_hour,
        )

    def work(self, settings: Settings, length: int, steps: float) -> Work:
        """What the answers of a step, of so many tokens and denoising steps a block, compute in an update."""
        lm = self.setup.lm
        answer = mean_trajectory(self.longest_prompt, length, steps, lm.block_size)
        strip = self.objective.views(answer, BlockSpec(lm.block_size, lm.mask_token_id), generator(0))
        prompt = self.longest_prompt // lm.block_size * lm.block_size
        # As many answers of a group as a row holds share their prompt there.
        own = max(len(strip) - prompt, 1)
        together = min(max((settings["row_tokens"] - prompt) // own, 1), settings["rl.group_size"])
        shared = group_work(strip, self.longest_prompt, together, lm.block_size)
        return shared.times(settings["rl.problems"] * settings["rl.group_size"] / together)

    def update_times(
        self, memory: Memory, work: Work, settings: Settings, count: int, device: Device
    ) -> dict[str, float]:
        """Seconds of the parts of a step's optimizer steps and of what is scored before them."""
        passes = settings["rl.mini_batches"] * settings["rl.epochs"]
        scorings = 0
        is_old_scored = self.objective.needs_old_logprobs and passes > 1 and settings["rl.old"] == "trainer"
        if is_old_scored or settings["rl.correction_cap"]:
            scorings += 1
        if memory.reference or memory.teacher:
            scorings += 1
        if self.memories.critic != "none":
            scorings += 1
        batch = self.batch(settings)
        compiled = compiles_layers(settings, self.setup.machine)
        phases = update_times(memory, batch, work, count, device, compiled, scorings, passes, settings["rl.epochs"])
        if self.memories.critic == "model":  # as large as the policy
            phases["critic"] = phases["backpropagation"] + phases["optimizer"]
        elif self.memories.critic == "head":  # a layer on the policy, which is read once more
            phases["critic"] = settings["rl.epochs"] * forward_seconds(
                memory.model, work.times(1 / count), device, compiled
            )
        return phases

    def push(self, memory: Memory, settings: Settings, count: int, device: Device) -> float:
        """Seconds in which the engine is given the policy's weights."""
        if isinstance(self.engine, Lmdeploy):
            return lmdeploy_push_seconds(memory, stays_awake=bool(settings["rl.async_rollout"]))
        return push_seconds(memory, count, device)
