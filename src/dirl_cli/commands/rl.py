"""`dirl rl`: sample groups of answers, reward them, and learn from the denoising steps that led to them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from dirl_cli.cli.build import build, choice
from dirl_cli.data.files import sources_of
from dirl_cli.data.preview import show
from dirl_cli.data.tokens import Tokens
from dirl_cli.errors import DirlError, Interrupted
from dirl_cli.evaluation.held_out import Exam
from dirl_cli.evaluation.sweep_table import Column, show_sweep
from dirl_cli.models.load import DiffusionLM, fingerprint, pick_dtype
from dirl_cli.models.peft import FullFinetune
from dirl_cli.models.save import require_pushable
from dirl_cli.models.shapes import outline, shapes
from dirl_cli.plan.budget import Machine
from dirl_cli.plan.forecast import PROMPT, RL, rl_budget
from dirl_cli.report.metrics_log import NoLog, open_log
from dirl_cli.report.plot import Panel
from dirl_cli.report.progress import StepProgress, due
from dirl_cli.reward.scoring import Rewards, Scorer
from dirl_cli.rl.advantages import ADVANTAGES
from dirl_cli.rl.objective import Objective
from dirl_cli.rl.rollouts import (
    REMEDIES,
    Answers,
    Replayed,
    Sampled,
    State,
    drawing,
    holds_signal,
    replayed,
    rescored,
    resting,
    sampling_ahead,
    teaches,
    why_without_signal,
    with_advantages,
)
from dirl_cli.rl.update import Learner
from dirl_cli.rollout.engines import Native
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.rollout.storage import Record, rollout_path, write_rollout
from dirl_cli.text import shell_word
from dirl_cli.training.checkpoint import Checkpoints, load, require_measured, require_same_run
from dirl_cli.training.logprobs import TokenScorer
from dirl_cli.training.optim import warmup_remark
from dirl_cli.training.parallel import gathered, start_accelerator, whole
from dirl_cli.training.prepare import Questions, Reader, epochs, fingerprint_of, require_same_data
from dirl_cli.training.session import StopSignal, keep
from dirl_cli.training.trainer import Trainer
from dirl_cli.types import Decoding, Instruction

PANELS = (
    Panel("Accuracy", {"accuracy": "rollouts", "greedy_accuracy": "greedy, held out"}, percent=True),
    Panel("Reward", {"reward": "reward"}),
    Panel("Tokens per forward", {"tokens_per_forward": "tokens"}),
    Panel("Answer length", {"length": "tokens"}),
    Panel("Entropy", {"entropy": "nats"}),
    Panel("Sampler against trainer", {"mismatch_mean": "mean", "mismatch_max": "largest"}),
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
PATIENCE = 5  # steps in a row without a signal after which it is said why
SHOWN = ("reward", "accuracy", "length", "tokens_per_forward", "kept")
RECIPE = (
    "model",
    "peft",
    "data",
    "instruction",
    "algo",
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
    here = ("cpu", cfg.dtype) if cfg.dry_run else (cfg.device, cfg.dtype, cfg.launch)
    accelerator = start_accelerator(*here)
    progress = StepProgress(cfg.steps, cfg.log_every, SHOWN, quiet=not accelerator.is_main_process)
    saved = out / "model"
    if saved.exists() and not cfg.dry_run:
        progress.say(
            f"{out} is finished: run `dirl eval {shell_word('model', saved)}`, or give another name= to train again"
        )
        return
    require_pushable(cfg.push_to_hub)

    model, peft, data, optim, schedule, logger, engine = (
        build(cfg[name]) for name in ("model", "peft", "data", "optim", "schedule", "logger", "rollout")
    )
    objective, rewards, decoding = build(cfg.algo, Objective), build(cfg.reward, Rewards), build(cfg.decoding, Decoding)
    instruction = build(cfg.instruction, Instruction)
    settle_ratio(cfg.rl)
    check(cfg.rl, objective, decoding)
    peft.require(cfg.launch)
    require_measured(cfg.keep_best, ["reward", "accuracy", *["greedy_accuracy"] * bool(cfg.eval_problems)])
    # its weights come once they are known to fit
    lm: DiffusionLM = (outline if cfg.dry_run else shapes)(model, cfg.attention)
    decoding = lm.decoding(decoding)
    place = Machine(cfg.device, cfg.dtype, cfg.attention, cfg.gpus * cfg.nodes, cfg.memory_gb)
    chosen = {key: OmegaConf.select(cfg, key) for key in RL}
    sampling, learns = None if cfg.rl.replay else engine, not cfg.rl.rollout_only
    adapter = partial(choice, "peft") if find_spec("peft") else None
    plan = partial(rl_budget, lm, optim, objective, decoding, place, chosen, peft=peft, adapter=adapter)
    if cfg.dry_run and lm.tokenizer is None:
        longest = cfg.rl.max_prompt_tokens or PROMPT
        progress.say(
            f"no tokenizer of {cfg.model.name} is here, so nothing is known of the data: prompts are taken to be"
            f" {longest:,} tokens"
        )
        plan(longest, sampling, learns).show(OmegaConf.to_container(cfg), progress.console)
        return
    reader = Reader(lm, instruction, accelerator, progress, max_prompt_tokens=cfg.rl.max_prompt_tokens)
    sources, weights = ([], []) if cfg.rl.replay else sources_of(data)
    names = [source.name for source in sources]
    pools = [reader.problems(f"training problems of {s.name}", s.training_problems(), s.remarks()) for s in sources]
    if empty := [name for name, pool in zip(names, pools, strict=True) if not pool.problems]:
        raise DirlError(f"nothing of {empty[0]} is left to learn from: raise rl.max_prompt_tokens, or give other data")
    if cfg.dry_run:
        prompts = [Tokens.of([(prompt, [False] * len(prompt)) for prompt in pool.prompts]) for pool in pools]
        answers = {name: [one.answer for one in pool.problems] for name, pool in zip(names, pools, strict=True)}
        show(dict(zip(names, prompts, strict=True)), lm.require_tokenizer(), progress.console, answers)
    longest = max((len(prompt) for pool in pools for prompt in pool.prompts), default=0)  # not known of a replay
    budget = plan(longest, sampling, learns)
    if cfg.dry_run:
        budget.show(OmegaConf.to_container(cfg), progress.console)
        return
    for warning in budget.warnings():
        progress.warn(warning)
    updates = cfg.steps * cfg.rl.mini_batches * cfg.rl.epochs
    if not cfg.rl.rollout_only and (remark := warmup_remark(schedule, updates)):
        progress.say(remark)
    engine.require()
    with progress.working("loading the model"):
        lm = peft.load(model, cfg.dtype, str(accelerator.device), cfg.attention)
    if cfg.gradient_checkpointing:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    base_fingerprint, data_fingerprint = fingerprint(lm.model), fingerprint_of(pools)
    reference = frozen(peft.reference(lm), decoding) if objective.beta else None
    twin = peft.merged(lm)  # before processes share the parameters
    stop = StopSignal(accelerator)
    trainer = Trainer(
        accelerator,
        TokenScorer(lm.model, lm.unsampled_ids, decoding),
        optim.build(lm.model),
        partial(schedule, steps=updates),
        cfg.clip_norm,
        cfg.max_skipped,
        cfg.skip_norm,
    )
    learner = Learner(
        trainer,
        objective,
        lm,
        reference=reference,
        old_from_sampler=cfg.rl.old == "sampler" and objective.is_exact,
        correction_cap=cfg.rl.correction_cap,
        mini_batches=cfg.rl.mini_batches,
        epochs=cfg.rl.epochs,
        train_tail=cfg.rl.train_tail,
        row_tokens=cfg.row_tokens,
        micro_rows=cfg.micro_rows,
        longest=decoding.max_new_tokens,
        seed=cfg.seed,
    )
    kept = (cfg.keep_checkpoints, cfg.keep_best, cfg.async_checkpoints)
    checkpoints = Checkpoints(out / "checkpoints", accelerator, *kept)
    state = State()
    path: Path | None = None
    if start := checkpoints.begin(cfg.resume, progress.say):
        require_same_run(start, "rl", base_fingerprint if objective.beta or peft != FullFinetune() else None)
        remembered = load(start, lm.model, trainer.optimizers)
        if start.parent == checkpoints.directory:  # another run's checkpoint may have seen other data
            require_same_data(cfg.data.name, remembered.get("data_fingerprint", data_fingerprint), data_fingerprint)
        trainer.steps_taken, trainer.skipped = remembered["updates"], remembered["skipped"]
        trainer.updates_applied = remembered.get("updates_applied", trainer.steps_taken)
        state, path = State.from_json(remembered), start
        progress.say(f"going on after step {state.step}, from {start}")
    config = OmegaConf.to_container(cfg)
    log = open_log(out, state.step or -1, logger, config) if accelerator.is_main_process else NoLog()
    held_out = reader.problems("held-out problems", data.problems()[: cfg.eval_problems])
    exam = Exam(held_out.problems, held_out.prompts, lm, decoding, accelerator, progress, stop.apart)
    sampler_lm = whole(twin, pick_dtype(cfg.dtype, lm.device.type))
    if cfg.rl.async_rollout and sampler_lm is twin and isinstance(engine, Native):
        sampler_lm = FullFinetune().reference(twin)  # a copy, since the parameters change while it samples
    sampler: Sampler = engine.start(sampler_lm, own_weights=sampler_lm is not twin)
    sampler.update_weights(gathered(peft.pushed(lm)), trainer.steps_taken)

    saved_at = state.step
    without_signal = 0  # steps in a row

    def save(metrics: dict[str, float]) -> Path:
        """Save the last whole step, of which these were the metrics."""
        remembered: dict[str, Any] = {"command": "rl"}
        remembered |= {"base_fingerprint": base_fingerprint, "data_fingerprint": data_fingerprint}
        remembered |= {"updates": trainer.steps_taken, "skipped": trainer.skipped, **state.to_json()}
        remembered["updates_applied"] = trainer.updates_applied
        with trainer.times("saving"):
            saved = checkpoints.save(state.step, lm.model, trainer.optimizers, metrics, **remembered)
            log.draw(PANELS, cfg.name, out / "rl.png")
        return saved

    with checkpoints, Scorer(rewards) as scorer, stop:
        source: Sampled | Replayed = (
            replayed(Path(cfg.rl.replay), cfg.steps, lm, cfg.rl.rescore)
            if cfg.rl.replay
            else sampled_from(pools, weights, lm, sampler, scorer, decoding, accelerator, cfg.rl, cfg.seed)
        )
        if exam.problems and state.step == 0 and not cfg.rl.rollout_only:
            with trainer.times("evaluation"):
                before = exam.take(sampler, scorer.grader)
            if stop:
                raise stop.end(0, cfg.steps, None)
            log.write(0, before | trainer.times.take())
            progress.note(0, before, "greedy_accuracy")
        with progress.after(state.step):
            while state.step < cfg.steps:
                torch.manual_seed(cfg.seed + state.step)  # for models with dropout
                until_now = replace(state)
                try:
                    showing = progress.working(f"step {state.step + 1}/{cfg.steps} · rollout")
                    with trainer.times("rollout"), showing, stop.alone():
                        groups, sampled = source.take(state)
                except Interrupted:  # what was sampled is given up: it is sampled again
                    state = until_now
                    if state.step > saved_at:
                        path = save({})
                    checkpoints.wait()
                    raise stop.end(state.step, cfg.steps, path) from None
                if cfg.rl.rescore:
                    sampled = rescored(sampled, scorer, decoding.max_new_tokens, lm.block_size)
                    groups = [group for group in sampled if teaches(group, cfg.rl.filter)]
                groups = with_advantages(groups, ADVANTAGES[objective.advantage])
                metrics = measured(sampled, groups, 0 if cfg.rl.replay else cfg.rl.group_size)
                if isinstance(source, Sampled):
                    metrics |= epochs(source.order, names, state.drawn)
                if groups and not cfg.rl.rollout_only:
                    meanwhile = resting(sampler)
                    if isinstance(source, Sampled) and cfg.rl.async_rollout and state.step + 1 < cfg.steps:
                        meanwhile = sampling_ahead(source, state)
                    with meanwhile, progress.working(f"step {state.step + 1}/{cfg.steps} · update"):
                        metrics |= learner.learn(groups, state.step)
                    sampler.update_weights(gathered(peft.pushed(lm)), trainer.steps_taken)
                state.step += 1
                if accelerator.is_main_process and (cfg.rl.rescore or not cfg.rl.replay):
                    write_rollout(rollout_path(out / "rollouts", state.step), records(groups, sampled))

                step, is_last = state.step, state.step == cfg.steps
                progress.update(step, metrics)
                without_signal = 0 if holds_signal(groups) else without_signal + 1
                if without_signal == PATIENCE and not cfg.rl.rollout_only:
                    progress.say(f"nothing is learned: {why_without_signal(sampled)}")
                if metrics.get("skipped"):
                    progress.note(step, metrics, "loss", "grad_norm", "skipped")
                if due(step, cfg.show_every):
                    progress.console.print(answer_table(groups or sampled, step))
                if exam.problems and (is_last or due(step, cfg.eval_every)) and not cfg.rl.rollout_only:
                    with trainer.times("evaluation"):
                        metrics |= exam.take(sampler, scorer.grader)
                    progress.note(step, metrics, "greedy_accuracy")
                log.write(step, metrics | trainer.times.take())
                must_stop = bool(stop) and not is_last
                is_due = due(step, cfg.save_every) and not trainer.skipped
                if is_last or must_stop or is_due or checkpoints.is_best(metrics):
                    path, saved_at = save(metrics), step
                if must_stop:
                    checkpoints.wait()
                    raise stop.end(step, cfg.steps, path)

    log.close()
    progress.sum_up(trainer.times.total)
    if cfg.rl.rollout_only:
        progress.say(f"the rollouts are in {out / 'rollouts'}: learn from them with `{shell_word('rl.replay', out)}`")
        return
    trainer.require_update(f"no group held a signal; {REMEDIES}")
    settings: Any = OmegaConf.to_container(cfg)
    summary = f"{cfg.model.name}, reinforced on {cfg.data.name} with `dirl rl algo={cfg.algo.name}`."
    keep(lm, peft, out, summary, settings, RECIPE, PANELS, decoding, accelerator, progress)


def after_sweep(title: str, jobs: Sequence[tuple[Sequence[str], Path]]) -> None:
    """Show the runs of a sweep together, seeds as their mean."""
    show_sweep(title, jobs, COLUMNS)


def sampled_from(
    pools: Sequence[Questions],
    weights: Sequence[float],
    lm: DiffusionLM,
    sampler: Sampler,
    scorer: Scorer,
    decoding: Decoding,
    accelerator: Accelerator,
    rl: DictConfig,
    seed: int,
) -> Sampled:
    """Groups sampled from pools of problems, which are drawn from by weight."""
    return Sampled(
        [problem for pool in pools for problem in pool.problems],
        [prompt for pool in pools for prompt in pool.prompts],
        lm,
        sampler,
        scorer,
        decoding,
        accelerator,
        problems=rl.problems,
        group_size=rl.group_size,
        filter=rl.filter,
        max_rounds=rl.max_rounds,
        order=drawing([len(pool.problems) for pool in pools], weights, seed),
        seed=seed,
    )


def frozen(lm: DiffusionLM, decoding: Decoding) -> TokenScorer:
    """A scorer of the model to stay near."""
    return TokenScorer(lm.model, lm.unsampled_ids, decoding).to(lm.device)


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


def measured(sampled: Sequence[Answers], groups: Sequence[Answers], group_size: int) -> dict[str, float]:
    """What a rollout looks like, before the filter and after it (`kept_…`).

    kept: the share of sampled groups with a signal. excluded: how many of `group_size` answers to each problem have
    no reward.
    """
    answers = [record for group in sampled for record in group]
    metrics: dict[str, float] = {"groups": len(groups)}
    if (excluded := len(sampled) * group_size - len(answers)) > 0:
        metrics["excluded"] = excluded
    if not answers:
        return metrics
    trajectories = [record.trajectory for record in answers]
    tokens = sum(len(one.token_ids) for one in trajectories)
    metrics |= {
        "reward": fmean(record.reward or 0.0 for record in answers),
        "accuracy": fmean(record.correct for record in answers),
        "length": fmean(len(one.completion_ids) for one in trajectories),
        "truncated": fmean(one.stop_reason == "length" for one in trajectories),
        "tokens_per_forward": tokens / sum(one.forwards for one in trajectories),
        "tokens_per_denoising_forward": tokens / sum(one.denoise_forwards for one in trajectories),
        "kept": fmean(any(record.kept for record in group) for group in sampled),
    }
    for part in answers[0].parts:
        metrics[f"reward/{part}"] = fmean(record.parts[part] for record in answers)
    if kept := [record for group in groups for record in group]:
        metrics["kept_reward"] = fmean(record.reward or 0.0 for record in kept)
        metrics["kept_accuracy"] = fmean(record.correct for record in kept)
    return metrics


def records(groups: Sequence[Answers], sampled: Sequence[Answers]) -> list[Record]:
    """What a step learned from, then what it sampled besides, be it for a later step."""
    used = {id(record.trajectory) for group in groups for record in group}
    rest = [replace(one, kept=False) for group in sampled for one in group if id(one.trajectory) not in used]
    return [record for group in groups for record in group] + rest


def answer_table(groups: Sequence[Answers], step: int, rows: int = 3) -> Table:
    """A few sampled answers with their rewards, the worst and the best of each of the first groups."""
    table = Table(title=f"step {step}", title_justify="left", show_lines=True)
    for column in ("question", "answer", "reward"):
        table.add_column(column, overflow="fold")
    for group in [group for group in groups if group][:rows]:
        ordered = sorted(group, key=lambda record: record.reward or 0.0)
        for record in (ordered[0], ordered[-1]):
            table.add_row(Text(record.problem.question), Text(record.completion[:400]), f"{record.reward:.2f}")
    return table
