"""`dirl dpo`: learn from pairs of answers, one preferred to the other. The training is dpo/train.py."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig
from torch import nn

from dirl_cli.commands.dpo_parts import DpoParts, build_dpo_parts, require_pairs
from dirl_cli.commands.pair_data import PairData, preview, read_pairs
from dirl_cli.commands.start import (
    compile_as_asked,
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
from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.dpo.batches import PairBatches, PairRows, hold_out_pairs
from dirl_cli.dpo.pairs import all_of
from dirl_cli.dpo.train import train
from dirl_cli.evaluation.held_out import HeldOutEval
from dirl_cli.evaluation.sweep_table import Column, show_sweep
from dirl_cli.models.load import DiffusionLM, fingerprint, pick_dtype
from dirl_cli.models.save import require_pushable
from dirl_cli.plan.dpo_forecast import dpo_budget, unknown_pairs
from dirl_cli.plan.forecast import PROMPT
from dirl_cli.plan.sft_forecast import FINETUNE
from dirl_cli.report.panels import DPO_PANELS
from dirl_cli.report.progress import StepProgress
from dirl_cli.reward.grading import Grader
from dirl_cli.rl.update import reference_model
from dirl_cli.sft.validation import FinetuneEvaluation
from dirl_cli.training.checkpoint import require_measured
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.optim import warmup_remark
from dirl_cli.training.parallel import context_group
from dirl_cli.training.prepare import fingerprint_of
from dirl_cli.training.session import Session
from dirl_cli.training.sharded_model import reference_copy
from dirl_cli.training.stop_signal import StopSignal
from dirl_cli.training.trainer import Trainer

COLUMNS = {
    "loss": Column("loss", 4),
    "reward_accuracy": Column("told apart %", 1, scale=100),
    "reward_margin": Column("margin", 3),
    "validation_loss": Column("validation loss", 4),
    "greedy_accuracy": Column("greedy accuracy %", 1, scale=100),
}
SHOWN = ("loss", "reward_margin", "reward_accuracy", "grad_norm", "lr", "tokens_per_s")
VALIDATED = ("validation_loss", "validation_reward_accuracy", "validation_reward_margin")
RECIPE = (
    "model",
    "peft",
    "data",
    "instruction",
    "likelihood",
    "dpo",
    "optim",
    "schedule",
    "steps",
    "batch_size",
    "max_tokens",
    "clip_norm",
    "seed",
)


def run(cfg: DictConfig, out: Path) -> None:
    """Have cfg.model prefer the chosen answers of pairs until `out`/model holds the result."""
    accelerator, progress = join_processes(cfg, SHOWN)
    if is_finished(cfg, out, progress):
        return

    # Everything that can be refused is refused before the weights are read.
    require_pushable(cfg.push_to_hub)
    parts = build_dpo_parts(cfg)
    require_pairs(cfg, parts)
    parts.peft.require()
    data = read_and_plan(cfg, parts, accelerator, progress)
    if data is None:
        return

    lm = load_model(cfg, parts.model, parts.peft, accelerator, progress)
    stop = StopSignal(accelerator)
    with Grader(workers=1) as grader:
        session, batches, reference, evaluation = open_training(
            cfg, out, parts, data, lm, stop, grader, accelerator, progress
        )
        with session:
            train(session, batches, reference, parts.preference, evaluation, cfg.micro_rows)
    session.trainer.require_update(
        "its gradients were skipped or its rates 0 (grad_norm and lr in metrics.jsonl tell which)"
    )
    leave_model(cfg, out, session, lm, parts.peft, lm.decoding(parts.decoding), RECIPE)


def read_and_plan(
    cfg: DictConfig, parts: DpoParts, accelerator: Accelerator, progress: StepProgress
) -> PairData | None:
    """The pairs, once the run is known to fit; None where it was to be looked at only, which it then was."""
    lm = shapes_of(cfg, parts.model)
    decoding = lm.decoding(parts.decoding)
    setup = training_setup(cfg, lm, parts.optim, parts.peft, FINETUNE)
    if cfg.dry_run and lm.tokenizer is None:
        progress.print_line(
            f"no tokenizer of {cfg.model.name} is here, so nothing is known of the data: answers with their prompts are"
            f" taken to be as long as max_tokens={cfg.max_tokens:,}, and prompts to be {PROMPT:,} tokens"
        )
        pairs = unknown_pairs(lm, decoding, min(cfg.max_tokens, lm.longest_prompt + 1))
        prompts = [[0] * PROMPT] * cfg.eval_problems
        show_budget(dpo_budget(setup, parts.views, decoding, pairs, prompts, known=False), cfg, progress)
        return None

    data = read_pairs(cfg, parts, lm, accelerator, progress)
    require_measured(cfg.keep_best, dpo_metrics(data))
    costliest = max(data.training, key=lambda pairs: pairs.costs.max())
    budget = dpo_budget(setup, parts.views, decoding, costliest, data.problems.prompts)
    if cfg.dry_run:
        preview(cfg, data, lm, progress)
        show_budget(budget, cfg, progress)
        return None
    for warning in budget.warnings():
        progress.warn(warning)
    if remark := warmup_remark(parts.schedule, cfg.steps):
        progress.print_line(remark)
    return data


def dpo_metrics(data: PairData) -> list[str]:
    """The metrics that may tell which checkpoint is the best."""
    metrics = ["loss", "reward_accuracy", "reward_margin"]
    if any(map(len, data.held_out)):
        metrics += VALIDATED
    if data.problems.problems:
        metrics.append("greedy_accuracy")
    return metrics


def open_training(
    cfg: DictConfig,
    out: Path,
    parts: DpoParts,
    data: PairData,
    lm: DiffusionLM,
    stop: StopSignal,
    grader: Grader,
    accelerator: Accelerator,
    progress: StepProgress,
) -> tuple[Session, PairBatches, nn.Module, FinetuneEvaluation | None]:
    """The run where it goes on, its batches, the frozen reference, and what it is measured by."""
    fingerprints = {
        "base_fingerprint": fingerprint(lm.model),
        "data_fingerprint": fingerprint_of([*data.training, *data.held_out]),
    }
    # The reference is made before a checkpoint changes the parameters.
    context = context_group(accelerator, cfg.context_parallel)
    reference = reference_model(reference_copy(lm, parts.peft), parts.decoding, context)
    compile_as_asked(cfg, reference.model)
    trainer = Trainer(
        accelerator,
        LogprobModel(lm.model, lm.unsampled_ids, parts.decoding, context=context),
        parts.optim.build(lm.model),
        partial(parts.schedule, steps=cfg.steps),
        cfg.clip_norm,
        cfg.max_skipped,
        cfg.skip_norm,
        stop.raising_if_alone,
        context=context,
    )
    spec = BlockSpec(lm.block_size, lm.mask_token_id)
    rows = PairRows(parts.views, spec, lm.pad_token_id, cfg.row_tokens, cfg.dpo.train_tail)
    batches = PairBatches(data.training, data.order(cfg.seed), cfg.batch_size, rows, cfg.seed, data.names)

    # Held-out pairs are laid out and scored by the reference once, so that their losses compare.
    validation = None
    unseen = list(chain.from_iterable(map(all_of, data.held_out)))
    if unseen:
        with progress.working("scoring held-out pairs by the reference"):
            validation = hold_out_pairs(
                unseen, rows, reference, trainer, parts.preference, cfg.micro_rows, cfg.seed
            ).measure
    questions = data.problems
    decoding = lm.decoding(parts.decoding)
    held_out = HeldOutEval(questions.problems, questions.prompts, lm, decoding, accelerator, progress, stop.raising)
    dtype = pick_dtype(cfg.dtype, lm.device.type)
    evaluation = None
    if validation or questions.problems:
        evaluation = FinetuneEvaluation(
            validation,
            "held-out pairs",
            held_out,
            lm,
            parts.peft,
            grader,
            dtype,
            progress,
            answers_before=True,
        )

    noted = (*VALIDATED, "greedy_accuracy")
    session = open_session(cfg, out, "dpo", trainer, lm, progress, stop, DPO_PANELS, noted, fingerprints)
    session.resume(cfg.resume, needs_base=True, data=data.names[0] if len(data.names) == 1 else cfg.data.name)
    open_run_log(cfg, out, session)
    return session, batches, reference, evaluation


def after_sweep(title: str, jobs: Sequence[tuple[Sequence[str], Path]]) -> None:
    """Show the runs of a sweep together, seeds as their mean."""
    show_sweep(title, jobs, COLUMNS)
