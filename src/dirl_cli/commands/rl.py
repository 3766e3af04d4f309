"""`dirl rl`: sample groups of answers, reward them, and learn from the denoising steps that led to them.

The training is rl/train.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import DictConfig

from dirl_cli.commands.learner import policy_update, require_teacher_room, teacher_parameters, teacher_prompt_of
from dirl_cli.commands.own_servers import own_servers, ready_engine, require_servers, servers_plan
from dirl_cli.commands.problems import Pools, read_problems
from dirl_cli.commands.rl_parts import (
    RlParts,
    block_growth,
    build_rl_parts,
    require_ahead,
    require_compatible,
    require_growth,
    require_hints,
    require_kept,
    require_measured_growth,
    require_steps,
    settle_ratio,
)
from dirl_cli.commands.rollout_source import rollout_source, start_sampler
from dirl_cli.commands.start import (
    is_finished,
    join_processes,
    leave_model,
    load_model,
    open_run_log,
    open_session,
    recorded_answers,
    shapes_of,
    show_budget,
    training_setup,
)
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.held_out import HeldOutEval, SamplerEvaluation
from dirl_cli.evaluation.sweep_table import Column, show_sweep
from dirl_cli.models.load import DiffusionLM, fingerprint, in_blocks_of
from dirl_cli.models.peft import FullFinetune
from dirl_cli.models.save import require_pushable
from dirl_cli.models.sharded_tensors import is_sharded
from dirl_cli.plan.forecast import PROMPT
from dirl_cli.plan.rl_forecast import RL, rl_budget
from dirl_cli.report.panels import RL_PANELS
from dirl_cli.report.progress import StepProgress
from dirl_cli.reward.scoring import RewardComputer
from dirl_cli.rl.block_growth import NO_GROWTH, BlockGrowth
from dirl_cli.rl.reporting import REMEDIES, RolloutReport
from dirl_cli.rl.rollout_state import RolloutState
from dirl_cli.rl.train import train
from dirl_cli.rollout.engines import Servers, require_strategy
from dirl_cli.rollout.server_keeper import ServerKeeper
from dirl_cli.text import shell_word
from dirl_cli.training.block_stages import NOTHING_TELLS, StagedEvaluation
from dirl_cli.training.checkpoint import require_measured
from dirl_cli.training.optim import warmup_remark
from dirl_cli.training.session import Evaluation, Session
from dirl_cli.training.stop_signal import StopSignal

COLUMNS = {
    "reward": Column("reward", 3),
    "accuracy": Column("accuracy %", 1, scale=100),
    "greedy_accuracy": Column("greedy accuracy %", 1, scale=100),
    "greedy_credit": Column("greedy credit %", 1, scale=100),
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
    "annealing",
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


def run(cfg: DictConfig, out: Path) -> None:
    """Reinforce cfg.model on cfg.data until `out`/model holds the result."""
    accelerator, progress = join_processes(cfg, SHOWN)
    if is_finished(cfg, out, progress):
        return

    # Everything that can be refused is refused before the weights are read.
    require_pushable(cfg.push_to_hub)
    settle_ratio(cfg.rl)
    parts = build_rl_parts(cfg)
    require_compatible(cfg.rl, parts.objective, parts.decoding)
    require_kept(cfg.rl, parts.reward_settings)
    require_hints(cfg.rl, parts.engine)
    require_strategy(parts.engine, parts.decoding)
    if not cfg.dry_run:  # which needs no servers
        require_servers(parts.engine, cfg.nodes)
    require_measured_growth(cfg, parts.annealing)
    require_ahead(cfg.rl.async_rollout, parts.engine, parts.annealing)
    require_steps(parts, cfg.launch)
    parts.peft.require()
    require_measured(cfg.keep_best, rl_metrics(cfg))
    pools = read_and_plan(cfg, out, parts, accelerator, progress)
    if pools is None:
        return

    with own_servers(cfg, out, parts, pools, progress) as keeper:
        lm = load_model(cfg, parts.model, parts.peft, accelerator, progress)
        engine = ready_engine(parts.engine, keeper, progress)
        settled = replace(parts, engine=engine, decoding=lm.decoding(parts.decoding))  # for all that follows
        growth = block_growth(cfg, parts, lm)
        session = reinforce(cfg, out, settled, pools, lm, growth, keeper, accelerator, progress)
    if cfg.rl.rollout_only:
        progress.print_line(
            f"the rollouts are in {out / 'rollouts'}: learn from them with `{shell_word('rl.replay', out)}`, or from"
            f" pairs of them with `dirl dpo {shell_word('dpo.pairs_from', out)}`"
        )
        return
    session.trainer.require_update(f"no group held a signal; {REMEDIES}")
    trained = growth.at(lm, cfg.steps - 1)
    if trained.block_size != lm.block_size:  # the run ended before the last stage
        lm = in_blocks_of(lm, trained.block_size)
        cfg.model.block_size = lm.block_size  # which the cards name
    leave_model(cfg, out, session, lm, parts.peft, lm.decoding(parts.decoding), RECIPE)


def read_and_plan(
    cfg: DictConfig, out: Path, parts: RlParts, accelerator: Accelerator, progress: StepProgress
) -> Pools | None:
    """The problems, once the run is known to fit; None where it was to be looked at only, which it then was."""
    lm = shapes_of(cfg, parts.model)
    engine = None if cfg.rl.replay or isinstance(parts.engine, Servers) else parts.engine
    learns = not cfg.rl.rollout_only
    require_growth(parts, lm)
    decoding = lm.decoding(parts.decoding)
    recorded = recorded_answers(Path(cfg.rl.replay) if cfg.rl.replay else out)
    setup = training_setup(cfg, lm, parts.optim, parts.peft, RL, recorded)
    teacher = teacher_parameters(cfg, parts.objective, lm)
    critic = parts.critic.kind
    growth = block_growth(cfg, parts, lm)
    if growth != NO_GROWTH:
        progress.print_line(f"{growth}, of {lm.block_size} thereafter; memory and time are those of the largest")
    if cfg.dry_run and lm.tokenizer is None:
        longest = cfg.rl.max_prompt_tokens or PROMPT
        progress.print_line(
            f"no tokenizer of {cfg.model.name} is here, so nothing is known of the data: prompts are taken to be"
            f" {longest:,} tokens"
        )
        asked = [[0] * longest] * cfg.eval_problems
        show_servers(cfg, parts, lm, longest, progress)
        budget = rl_budget(setup, parts.objective, decoding, longest, engine, learns, teacher, critic, asked)
        show_budget(budget, cfg, progress)
        return None

    pools = read_problems(cfg, parts, lm, accelerator, progress)
    teacher_prompt = teacher_prompt_of(cfg, parts, lm)
    if teacher_prompt:
        require_teacher_room(teacher_prompt, pools, lm, decoding.max_new_tokens)
    longest = pools.longest_prompt
    asked = [] if isinstance(parts.engine, Servers) else pools.held_out.prompts
    budget = rl_budget(setup, parts.objective, decoding, longest, engine, learns, teacher, critic, asked)
    if cfg.dry_run:
        show_servers(cfg, parts, lm, longest, progress)
        show_budget(budget, cfg, progress)
        return None
    for warning in budget.warnings():
        progress.warn(warning)
    remark = warmup_remark(parts.schedule, updates_of(cfg))
    if remark and learns:
        progress.print_line(remark)
    return pools


def show_servers(cfg: DictConfig, parts: RlParts, lm: DiffusionLM, longest: int, progress: StepProgress) -> None:
    """Say in a dry run what servers take, where these sample. longest: tokens of the longest prompt."""
    if isinstance(parts.engine, Servers):
        progress.print_line(servers_plan(cfg, parts.engine, lm, lm.decoding(parts.decoding), longest))


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
    growth: BlockGrowth,
    keeper: ServerKeeper,
    accelerator: Accelerator,
    progress: StepProgress,
) -> Session:
    """Take the steps that are left of the run, with everything they need around them."""
    fingerprints = {"base_fingerprint": fingerprint(lm.model), "data_fingerprint": pools.fingerprint}
    # Of a model that processes share there is no whole one yet.
    inference_lm = lm if is_sharded(lm.model) else parts.peft.merged(lm)
    stop = StopSignal(accelerator)
    update = policy_update(cfg, parts, lm, inference_lm, accelerator, updates_of(cfg), growth)
    if parts.objective.other_teacher and update.reference:
        fingerprints["teacher_fingerprint"] = fingerprint(update.reference.model)
    noted = ("greedy_accuracy", "greedy_credit")
    session = open_session(cfg, out, "rl", update.trainer, lm, progress, stop, RL_PANELS, noted, fingerprints)
    session.further = update.tensors
    if update.critic:
        session.others = {"critic": update.critic.trainer}
    needs_base = parts.objective.beta > 0 or parts.peft != FullFinetune()
    remembered = session.resume(cfg.resume, needs_base, cfg.data.name)
    if growth.measured and remembered and "stages" in remembered:
        growth.measured.restore(remembered["stages"])
    open_run_log(cfg, out, session)
    sampler = start_sampler(cfg, parts, inference_lm, keeper)
    update.publish(sampler)

    def block_size() -> int:
        """That of the last step that was finished, or of the first."""
        return growth.at(lm, max(session.step - 1, 0)).block_size

    def growth_state() -> dict[str, Any]:
        """What a checkpoint keeps of blocks that grow."""
        state: dict[str, Any] = {} if growth == NO_GROWTH else {"block_size": block_size()}
        return state | ({"stages": growth.measured.to_json()} if growth.measured else {})

    learns = not cfg.rl.rollout_only
    with RewardComputer(parts.reward_settings) as reward_computer:
        rollouts = rollout_source(cfg, parts, pools, lm, sampler, reward_computer, accelerator, growth)
        if remembered:
            rollouts.state = RolloutState.from_json(remembered)
        session.state = lambda: rollouts.state.to_json() | growth_state()
        writes = accelerator.is_main_process and rollouts.is_new
        directory = out / "rollouts" if writes else None
        report = RolloutReport(directory, cfg.show_every, learns, progress, cfg.rl.compress_rollouts)
        session.before_saving = report.wait

        questions = pools.held_out
        held_out = HeldOutEval(
            questions.problems, questions.prompts, lm, parts.decoding, accelerator, progress, stop.raising
        )
        evaluation: Evaluation | None = None
        if questions.problems and learns:
            evaluation = SamplerEvaluation(held_out, sampler, reward_computer.grader, block_size)
        if growth.measured:
            if evaluation is None:
                raise DirlError(NOTHING_TELLS)
            evaluation = StagedEvaluation(evaluation, growth.measured, lambda: session.step)
        with session, report:
            train(session, rollouts, update, sampler, report, evaluation, learns)
    return session


def rl_metrics(cfg: DictConfig) -> list[str]:
    """The metrics that may tell which checkpoint is the best."""
    metrics = ["reward", "accuracy"]
    if cfg.eval_problems:
        metrics.append("greedy_accuracy")
    return metrics


def after_sweep(title: str, jobs: Sequence[tuple[Sequence[str], Path]]) -> None:
    """Show the runs of a sweep together, seeds as their mean."""
    show_sweep(title, jobs, COLUMNS)
