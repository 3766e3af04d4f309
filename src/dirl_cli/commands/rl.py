"""`dirl rl`: sample groups of answers, reward them, and learn from the denoising steps that led to them.

The training is rl/train.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import DictConfig

from dirl_cli.cli.build import build
from dirl_cli.commands.start import (
    is_finished,
    join_processes,
    leave_model,
    load_model,
    open_run_log,
    open_session,
    shapes_of,
    show_budget,
    training_setup,
)
from dirl_cli.data.chat import answer_text
from dirl_cli.data.files import sources_of
from dirl_cli.data.preview import show_examples
from dirl_cli.data.tokens import TokenTable
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.held_out import HeldOutEval, SamplerEvaluation
from dirl_cli.evaluation.sweep_table import Column, show_sweep
from dirl_cli.models.load import DiffusionLM, SavedModel, fingerprint, pick_dtype
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.models.save import require_pushable
from dirl_cli.plan.forecast import PROMPT, RL, rl_budget
from dirl_cli.report.plot import Panel
from dirl_cli.report.progress import StepProgress
from dirl_cli.reward.scoring import RewardComputer, RewardSettings
from dirl_cli.rl.corrections import Correction
from dirl_cli.rl.critic import Critic, LearnedCritic, NoCritic, StepAdvantages, require_whole_trace
from dirl_cli.rl.curriculum import EVERYTHING, Curriculum
from dirl_cli.rl.objective import Objective
from dirl_cli.rl.reporting import REMEDIES, RolloutReport
from dirl_cli.rl.rollouts import (
    ReplayedRollouts,
    Rescorer,
    RolloutSource,
    RolloutState,
    SampledRollouts,
    problem_order,
    rollouts_of,
)
from dirl_cli.rl.train import train
from dirl_cli.rl.update import PolicyUpdate, reference_model
from dirl_cli.rollout.engines import Native
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.text import shell_word
from dirl_cli.training.checkpoint import require_measured
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.optim import warmup_remark
from dirl_cli.training.parallel import unsharded_model
from dirl_cli.training.prepare import Questions, Reader, fingerprint_of
from dirl_cli.training.session import Session
from dirl_cli.training.stop_signal import StopSignal
from dirl_cli.training.trainer import Trainer
from dirl_cli.types import Decoding, Instruction

PANELS = (
    Panel("Accuracy", {"accuracy": "rollouts", "greedy_accuracy": "greedy, held out"}, percent=True),
    Panel("Reward", {"reward": "reward"}),
    Panel("Tokens per forward", {"tokens_per_forward": "tokens"}),
    Panel("Answer length", {"length": "tokens"}),
    Panel("Entropy", {"entropy": "nats"}),
    Panel("Sampler against trainer", {"mismatch_mean": "mean", "mismatch_max": "largest"}),
    Panel("Critic", {"explained_variance": "explained variance", "value_loss": "loss"}),
    Panel("Divergence from the reference", {"kl": "nats"}),
)
COLUMNS = {
    "reward": Column("reward", 3),
    "accuracy": Column("accuracy %", 1, scale=100),
    "greedy_accuracy": Column("greedy accuracy %", 1, scale=100),
    "length": Column("length", 0),
    "tokens_per_forward": Column("tok/fwd", 2),
    "kl": Column("kl", 4),
}
SHOWN = ("reward", "accuracy", "length", "tokens_per_forward", "kept")
RECIPE = (
    "model",
    "peft",
    "data",
    "instruction",
    "algo",
    "critic",
    "reward",
    "rl",
    "optim",
    "schedule",
    "steps",
    "clip_norm",
    "seed",
)


@dataclass(frozen=True)
class RlParts:
    """What the config's groups describe."""

    model: Any
    peft: Peft
    data: Any
    optim: Any
    schedule: Any
    engine: Any
    objective: Objective
    critic: NoCritic | LearnedCritic
    reward_settings: RewardSettings
    decoding: Decoding
    instruction: Instruction


@dataclass(frozen=True)
class Pools:
    """The problems to learn from, by source, and those to measure on. names, weights: of the sources."""

    names: list[str]
    weights: list[float]
    training: list[Questions]
    held_out: Questions

    @property
    def longest_prompt(self) -> int:
        """In tokens; 0 where a replay brings its own."""
        prompts = chain.from_iterable(pool.prompts for pool in self.training)
        return max(map(len, prompts), default=0)


def run(cfg: DictConfig, out: Path) -> None:
    """Reinforce cfg.model on cfg.data until `out`/model holds the result."""
    accelerator, progress = join_processes(cfg, SHOWN)
    if is_finished(cfg, out, progress):
        return

    # Everything that can be refused is refused before the weights are read.
    require_pushable(cfg.push_to_hub)
    settle_ratio(cfg.rl)
    parts = build_rl_parts(cfg)
    check(cfg.rl, parts.objective, parts.decoding)
    require_steps(parts, cfg.launch)
    parts.peft.require(cfg.launch)
    require_measured(cfg.keep_best, rl_metrics(cfg))
    pools = read_and_plan(cfg, parts, accelerator, progress)
    if pools is None:
        return
    parts.engine.require()

    lm = load_model(cfg, parts.model, parts.peft, accelerator, progress)
    parts = replace(parts, decoding=lm.decoding(parts.decoding))  # settled for all that follows
    session = reinforce(cfg, out, parts, pools, lm, accelerator, progress)
    if cfg.rl.rollout_only:
        progress.print_line(
            f"the rollouts are in {out / 'rollouts'}: learn from them with `{shell_word('rl.replay', out)}`"
        )
        return
    session.trainer.require_update(f"no group held a signal; {REMEDIES}")
    leave_model(cfg, out, session, lm, parts.peft, parts.decoding, RECIPE)


def read_and_plan(cfg: DictConfig, parts: RlParts, accelerator: Accelerator, progress: StepProgress) -> Pools | None:
    """The problems, once the run is known to fit; None where it was to be looked at only, which it then was."""
    lm = shapes_of(cfg, parts.model)
    engine = None if cfg.rl.replay else parts.engine
    learns = not cfg.rl.rollout_only
    decoding = lm.decoding(parts.decoding)
    setup = training_setup(cfg, lm, parts.optim, parts.peft, RL)
    teacher = 0
    if parts.objective.teacher:
        teacher_shapes = shapes_of(cfg, SavedModel("teacher", parts.objective.teacher))
        require_same_tokens(teacher_shapes, lm)
        teacher = sum(parameter.numel() for parameter in teacher_shapes.model.parameters())
    critic = parts.critic.kind
    if cfg.dry_run and lm.tokenizer is None:
        longest = cfg.rl.max_prompt_tokens or PROMPT
        progress.print_line(
            f"no tokenizer of {cfg.model.name} is here, so nothing is known of the data: prompts are taken to be"
            f" {longest:,} tokens"
        )
        show_budget(
            rl_budget(setup, parts.objective, decoding, longest, engine, learns, teacher, critic), cfg, progress
        )
        return None

    pools = read_problems(cfg, parts, lm, accelerator, progress)
    budget = rl_budget(setup, parts.objective, decoding, pools.longest_prompt, engine, learns, teacher, critic)
    if cfg.dry_run:
        show_budget(budget, cfg, progress)
        return None
    for warning in budget.warnings():
        progress.warn(warning)
    remark = warmup_remark(parts.schedule, updates_of(cfg))
    if remark and learns:
        progress.print_line(remark)
    return pools


def updates_of(cfg: DictConfig) -> int:
    """Optimizer steps in the whole run, as far as every rollout has groups to learn from."""
    updates: int = cfg.steps * cfg.rl.mini_batches * cfg.rl.epochs
    return updates


def reinforce(
    cfg: DictConfig,
    out: Path,
    parts: RlParts,
    pools: Pools,
    lm: DiffusionLM,
    accelerator: Accelerator,
    progress: StepProgress,
) -> Session:
    """Take the steps that are left of the run, with everything they need around them."""
    fingerprints = {"base_fingerprint": fingerprint(lm.model), "data_fingerprint": fingerprint_of(pools.training)}
    inference_lm = parts.peft.merged(lm)  # before processes share the parameters
    stop = StopSignal(accelerator)
    update = policy_update(cfg, parts, lm, inference_lm, accelerator, updates_of(cfg))
    noted = ("greedy_accuracy",)
    session = open_session(cfg, out, "rl", update.trainer, lm, progress, stop, PANELS, noted, fingerprints)
    session.further = update.tensors
    if update.critic:
        session.others = {"critic": update.critic.trainer}
    needs_base = parts.objective.beta > 0 or parts.peft != FullFinetune()
    remembered = session.resume(cfg.resume, needs_base, cfg.data.name)
    open_run_log(cfg, out, session)
    sampler = start_sampler(cfg, parts, inference_lm)
    update.publish(sampler)

    learns = not cfg.rl.rollout_only
    with RewardComputer(parts.reward_settings) as reward_computer:
        rollouts = rollout_source(cfg, parts, pools, lm, sampler, reward_computer, accelerator)
        if remembered:
            rollouts.state = RolloutState.from_json(remembered)
        session.state = lambda: rollouts.state.to_json()
        writes = accelerator.is_main_process and rollouts.is_new
        report = RolloutReport(out / "rollouts" if writes else None, cfg.show_every, learns, progress)

        questions = pools.held_out
        held_out = HeldOutEval(
            questions.problems, questions.prompts, lm, parts.decoding, accelerator, progress, stop.raising
        )
        evaluation = None
        if questions.problems and learns:
            evaluation = SamplerEvaluation(held_out, sampler, reward_computer.grader)
        with session:
            train(session, rollouts, update, sampler, report, evaluation, learns)
    return session


def build_rl_parts(cfg: DictConfig) -> RlParts:
    """What the config's groups describe."""
    return RlParts(
        model=build(cfg.model),
        peft=build(cfg.peft),
        data=build(cfg.data),
        optim=build(cfg.optim),
        schedule=build(cfg.schedule),
        engine=build(cfg.rollout),
        objective=build(cfg.algo, Objective),
        critic=build(cfg.critic),
        reward_settings=build(cfg.reward, RewardSettings),
        decoding=build(cfg.decoding, Decoding),
        instruction=build(cfg.instruction, Instruction),
    )


def settle_ratio(rl: DictConfig) -> None:
    """Put what an on-policy or an off-policy rollout wants in the place of `old: auto` and of no `correction_cap`."""
    if rl.old == "auto":
        rl.old = "trainer" if rl.async_rollout else "sampler"
    if rl.correction_cap is None:
        rl.correction_cap = 2.0 if rl.async_rollout else 0.0


def check(rl: DictConfig, objective: Objective, decoding: Decoding) -> None:
    """Raises DirlError for choices that exclude each other, before anything is loaded."""
    if rl.correction_cap and not (rl.old == "trainer" and objective.is_exact):
        raise DirlError(
            "rl.correction_cap wants rl.old=trainer and an algorithm that scores the true trace, as dipo: set it to 0"
        )
    if decoding.temperature == 0 and not rl.replay:
        raise DirlError("decoding.temperature=0 gives a group equal answers, from which there is nothing to learn")


def require_steps(parts: RlParts, launch: str) -> None:
    """Raises DirlError where steps have values or rewards and the algorithm does not score them all."""
    if isinstance(parts.critic, LearnedCritic):
        parts.critic.require(parts.peft, launch)
        require_whole_trace(parts.objective, "a critic")
    if parts.critic.gamma < 1:
        require_whole_trace(parts.objective, f"critic.gamma={parts.critic.gamma:g}")
    if parts.reward_settings.process:
        require_whole_trace(parts.objective, "reward.process")


def rl_metrics(cfg: DictConfig) -> list[str]:
    """The metrics that may tell which checkpoint is the best."""
    metrics = ["reward", "accuracy"]
    if cfg.eval_problems:
        metrics.append("greedy_accuracy")
    return metrics


def read_problems(
    cfg: DictConfig, parts: RlParts, lm: DiffusionLM, accelerator: Accelerator, progress: StepProgress
) -> Pools:
    """The problems with their prompts. Raises DirlError where nothing of a source is left to learn from."""
    reader = Reader(lm, parts.instruction, accelerator, progress, max_prompt_tokens=cfg.rl.max_prompt_tokens)
    sources, weights = sources_of(parts.data)
    if cfg.rl.replay:  # which brings problems of its own
        sources, weights = [], []

    pools: dict[str, Questions] = {}
    for source in sources:
        title = f"training problems of {source.name}"
        pools[source.name] = reader.problems(title, source.training_problems(), source.remarks())
        if not pools[source.name].problems:
            raise DirlError(
                f"nothing of {source.name} is left to learn from: raise rl.max_prompt_tokens, or give other data"
            )

    if cfg.dry_run:
        preview(pools, lm, progress)
        held_out = Questions([], [])
    else:
        held_out = reader.problems("held-out problems", parts.data.problems()[: cfg.eval_problems])
    return Pools(list(pools), list(weights), list(pools.values()), held_out)


def preview(pools: Mapping[str, Questions], lm: DiffusionLM, progress: StepProgress) -> None:
    """Show the first prompts of each source as the model sees them, and their reference answers."""
    prompts, answers = {}, {}
    for name, pool in pools.items():
        prompts[name] = TokenTable.of([(prompt, [False] * len(prompt)) for prompt in pool.prompts])
        answers[name] = [problem.answer for problem in pool.problems]
    show_examples(prompts, lm.require_tokenizer(), progress.console, answers)


def policy_update(
    cfg: DictConfig,
    parts: RlParts,
    lm: DiffusionLM,
    inference_lm: DiffusionLM,
    accelerator: Accelerator,
    updates: int,
) -> PolicyUpdate:
    """What updates the model, `updates` times in all, and keeps it near a reference where that is asked for.

    inference_lm: the model without an adapter, whose copy a reference that moves is.
    """
    objective = parts.objective
    reference = None
    if objective.teacher:
        teacher = SavedModel("teacher", objective.teacher).load(cfg.dtype, str(lm.device), cfg.attention)
        teacher.model.requires_grad_(False)
        reference = reference_model(teacher, parts.decoding)
    elif objective.beta and objective.reference_every:
        reference = reference_model(FullFinetune().reference(inference_lm), parts.decoding)
    elif objective.beta:
        reference = reference_model(parts.peft.reference(lm), parts.decoding)

    schedule = partial(parts.schedule, steps=updates)
    critic = None
    gae_lambda = 1.0
    if isinstance(parts.critic, LearnedCritic):
        critic = start_critic(cfg, parts.critic, lm, accelerator, schedule)
        gae_lambda = parts.critic.gae_lambda
    trainer = Trainer(
        accelerator,
        LogprobModel(lm.model, lm.unsampled_ids, parts.decoding),
        parts.optim.build(lm.model),
        schedule,
        cfg.clip_norm,
        cfg.max_skipped,
        cfg.skip_norm,
    )
    return PolicyUpdate(
        trainer,
        objective,
        objective.estimator(parts.reward_settings.weights),
        lm,
        reference=reference,
        old_from_sampler=cfg.rl.old == "sampler" and objective.is_exact,
        correction=Correction(
            cfg.rl.correction_cap, cfg.rl.correction_floor, cfg.rl.correction_level, cfg.rl.correction
        ),
        mini_batches=cfg.rl.mini_batches,
        epochs=cfg.rl.epochs,
        train_tail=cfg.rl.train_tail,
        row_tokens=cfg.row_tokens,
        micro_rows=cfg.micro_rows,
        longest=parts.decoding.max_new_tokens,
        seed=cfg.seed,
        peft=parts.peft,
        critic=critic,
        step_advantages=StepAdvantages(parts.critic.gamma, gae_lambda),
    )


def require_same_tokens(teacher: DiffusionLM, lm: DiffusionLM) -> None:
    """Raises DirlError for a teacher with other tokens, blocks or mask, which could not score the policy's states."""
    reason = None
    if teacher.block_size != lm.block_size:
        reason = f"blocks of {teacher.block_size}, and the policy of {lm.block_size}"
    elif teacher.mask_token_id != lm.mask_token_id:
        reason = f"the mask token {teacher.mask_token_id}, and the policy {lm.mask_token_id}"
    elif teacher.tokenizer and lm.tokenizer and teacher.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        reason = "other tokens than the policy"
    if reason:
        raise DirlError(f"the teacher has {reason}: give algo.teacher a model of the same family")


def start_critic(
    cfg: DictConfig,
    settings: LearnedCritic,
    lm: DiffusionLM,
    accelerator: Accelerator,
    schedule: Callable[[int], float],
) -> Critic:
    """The critic of a policy that has not learned yet, which takes a step with every one of the policy's."""
    model = settings.model(lm)
    optimizers = [settings.optimizer(model)]
    trainer = Trainer(
        accelerator, model, optimizers, schedule, cfg.clip_norm, cfg.max_skipped, cfg.skip_norm, rate="critic.lr"
    )
    return Critic(trainer, settings.value_clip)


def start_sampler(cfg: DictConfig, parts: RlParts, lm: DiffusionLM) -> Sampler:
    """The engine with weights to sample from; a copy of them where they would change while it samples."""
    sampler_lm = unsharded_model(lm, pick_dtype(cfg.dtype, lm.device.type))
    if cfg.rl.async_rollout and sampler_lm is lm and isinstance(parts.engine, Native):
        sampler_lm = FullFinetune().reference(lm)
    sampler: Sampler = parts.engine.start(sampler_lm, own_weights=sampler_lm is not lm)
    return sampler


def rollout_source(
    cfg: DictConfig,
    parts: RlParts,
    pools: Pools,
    lm: DiffusionLM,
    sampler: Sampler,
    reward_computer: RewardComputer,
    accelerator: Accelerator,
) -> RolloutSource:
    """Where groups of answers come from: the sampler, or an earlier run's rollouts."""
    decode = partial(answer_text, lm.require_tokenizer()) if parts.reward_settings.process else None
    if cfg.rl.replay:
        rescorer = Rescorer(reward_computer, cfg.rl.filter, parts.decoding.max_new_tokens, lm.block_size, decode)
        files = rollouts_of(Path(cfg.rl.replay), cfg.steps)
        return ReplayedRollouts(files, lm, rescorer if cfg.rl.rescore else None)
    curriculum = EVERYTHING
    if cfg.rl.curriculum:
        hardest, easiest = cfg.rl.curriculum
        curriculum = Curriculum(hardest, easiest, cfg.rl.curriculum_rest)
    return SampledRollouts(
        list(chain.from_iterable(pool.problems for pool in pools.training)),
        list(chain.from_iterable(pool.prompts for pool in pools.training)),
        lm,
        sampler,
        reward_computer,
        parts.decoding,
        accelerator,
        problems_per_step=cfg.rl.problems,
        group_size=cfg.rl.group_size,
        filter=cfg.rl.filter,
        max_rounds=cfg.rl.max_rounds,
        order=problem_order([len(pool.problems) for pool in pools.training], pools.weights, cfg.seed),
        seed=cfg.seed,
        sources=pools.names,
        prefetches=cfg.rl.async_rollout,
        curriculum=curriculum,
        decode=decode,
    )


def after_sweep(title: str, jobs: Sequence[tuple[Sequence[str], Path]]) -> None:
    """Show the runs of a sweep together, seeds as their mean."""
    show_sweep(title, jobs, COLUMNS)
