"""`dirl sft`: hide answer tokens of demonstrations and learn to fill them in."""

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dirl_cli.cli.build import build, choice
from dirl_cli.data.files import sources_of
from dirl_cli.data.order import Order, generator
from dirl_cli.data.preview import show
from dirl_cli.diffusion.layout import Rows
from dirl_cli.errors import DirlError, Interrupted
from dirl_cli.evaluation.held_out import Exam
from dirl_cli.evaluation.sweep_table import Column, show_sweep
from dirl_cli.models.load import DiffusionLM, fingerprint, pick_dtype
from dirl_cli.models.peft import FullFinetune
from dirl_cli.models.save import require_pushable
from dirl_cli.models.shapes import outline, shapes
from dirl_cli.models.tiny import Tiny
from dirl_cli.plan.budget import Machine
from dirl_cli.plan.forecast import PROMPT, SFT, sft_budget
from dirl_cli.report.metrics_log import NoLog, open_log
from dirl_cli.report.plot import Panel
from dirl_cli.report.progress import StepProgress, due
from dirl_cli.reward.grading import Grader
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.sft.batches import Noise, NoisedBatches, Padded
from dirl_cli.sft.validation import hold_out, metric
from dirl_cli.text import shell_word
from dirl_cli.training.checkpoint import Checkpoints, load, require_measured, require_same_run
from dirl_cli.training.logprobs import TokenScorer
from dirl_cli.training.optim import AdamW, warmup_remark
from dirl_cli.training.parallel import start_accelerator, whole
from dirl_cli.training.prepare import Reader, epochs, fingerprint_of, require_same_data
from dirl_cli.training.session import StopSignal, keep
from dirl_cli.training.trainer import Sums, Trainer
from dirl_cli.types import Decoding, Instruction

MEASURING = "measuring held-out demonstrations"
PANELS = (
    Panel("Loss per answer token", {"loss": "training", "validation_loss": "validation"}, log=True),
    Panel("Greedy accuracy", {"greedy_accuracy": "accuracy"}, percent=True),
    Panel("Learning rate", {"lr": "learning rate"}, smooth=False),
    Panel("Gradient norm", {"grad_norm": "gradient norm"}),
    Panel("Tokens per second", {"tokens_per_s": "tokens"}),
)
COLUMNS = {
    "loss": Column("loss", 4),
    "validation_loss": Column("validation loss", 4),
    "greedy_accuracy": Column("greedy accuracy %", 1, scale=100),
}
SHOWN = ("loss", "grad_norm", "lr", "tokens_per_s")
LEAST_RATE = 1e-4  # at which AdamW gets anywhere from random weights
RECIPE = (
    "model",
    "peft",
    "data",
    "instruction",
    "masking",
    "annealing",
    "optim",
    "schedule",
    "steps",
    "batch_size",
    "max_tokens",
    "clip_norm",
    "seed",
)


def run(cfg: DictConfig, out: Path) -> None:
    """Fine-tune cfg.model on cfg.data until `out`/model holds the result."""
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

    model, peft, data, masking, annealing, optim, schedule, logger = (
        build(cfg[name]) for name in ("model", "peft", "data", "masking", "annealing", "optim", "schedule", "logger")
    )
    peft.require(cfg.launch)
    instruction = build(cfg.instruction, Instruction)
    # its weights come once they are known to fit
    lm: DiffusionLM = (outline if cfg.dry_run else shapes)(model, cfg.attention)
    annealing.check(lm.block_size)
    decoding = lm.decoding(build(cfg.decoding, Decoding))
    place = Machine(cfg.device, cfg.dtype, cfg.attention, cfg.gpus * cfg.nodes, cfg.memory_gb)
    chosen = {key: OmegaConf.select(cfg, key) for key in SFT}
    adapter = partial(choice, "peft") if find_spec("peft") else None
    plan = partial(sft_budget, lm, optim, masking, decoding, place, chosen, peft=peft, adapter=adapter)
    if cfg.dry_run and lm.tokenizer is None:
        progress.say(
            f"no tokenizer of {cfg.model.name} is here, so nothing is known of the data: demonstrations are taken to be"
            f" as long as max_tokens={cfg.max_tokens:,}, and prompts to be {PROMPT:,} tokens"
        )
        unknown = plan(np.array([cfg.max_tokens]), [[0] * PROMPT] * cfg.eval_problems)
        unknown.show(OmegaConf.to_container(cfg), progress.console)
        return
    sources, weights = sources_of(data)
    names = [source.name for source in sources]
    reader = Reader(lm, instruction, accelerator, progress, cfg.max_tokens)
    training = [reader.demonstrations(f"training demonstrations of {s.name}", s.demonstrations()) for s in sources]
    held_out = [reader.demonstrations(f"held-out demonstrations of {s.name}", s.validation()) for s in sources]
    if empty := [name for name, tokens in zip(names, training, strict=True) if not len(tokens)]:
        raise DirlError(f"nothing of {empty[0]} is left to learn from: raise max_tokens, or give other data")
    order = Order(tuple(map(len, training)), tuple(weights), partial(generator, cfg.seed))
    if cfg.dry_run:
        show(dict(zip(names, training, strict=True)), lm.require_tokenizer(), progress.console)
        reached = epochs(order, names, cfg.steps * cfg.batch_size)
        progress.say(f"after {cfg.steps} steps: {' · '.join(f'{name} {n:.2f}' for name, n in reached.items())}")
    asked = reader.problems("held-out problems", data.problems()[: cfg.eval_problems])
    by_rate = {metric(rate): f"{rate:.0%} masked" for rate in cfg.mask_rates}
    measured = ["validation_loss", *by_rate] if any(map(len, held_out)) else []
    require_measured(cfg.keep_best, ["loss", *measured, *["greedy_accuracy"] * bool(asked.problems)])
    lengths = np.concatenate([tokens.lengths for tokens in training])
    budget = plan(lengths, asked.prompts)
    if cfg.dry_run:
        budget.show(OmegaConf.to_container(cfg), progress.console)
        return
    for warning in budget.warnings():
        progress.warn(warning)
    if isinstance(model, Tiny) and isinstance(optim, AdamW) and optim.lr < LEAST_RATE:
        progress.warn(f"optim.lr={optim.lr} is for a published checkpoint, and this model begins at random: give 1e-3")
    if remark := warmup_remark(schedule, cfg.steps):
        progress.say(remark)
    with progress.working("loading the model"):
        lm = peft.load(model, cfg.dtype, str(accelerator.device), cfg.attention)
    if cfg.gradient_checkpointing:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    base_fingerprint, data_fingerprint = fingerprint(lm.model), fingerprint_of([*training, *held_out])
    stop = StopSignal(accelerator)
    exam = Exam(asked.problems, asked.prompts, lm, decoding, accelerator, progress, stop.apart)
    del data, sources  # and their rows
    noise = Noise(masking, lm.block_size, lm.mask_token_id, lm.pad_token_id, cfg.row_tokens)
    examples = Padded(training, lm.block_size, lm.pad_token_id)
    noises = lambda step: annealing.noise(noise, step / cfg.steps)  # noqa: E731
    batches = NoisedBatches(examples, order, cfg.batch_size, noises, cfg.seed)

    rates = partial(schedule, steps=cfg.steps)
    limits = (cfg.clip_norm, cfg.max_skipped, cfg.skip_norm, stop.alone)
    trainer = Trainer(accelerator, TokenScorer(lm.model), optim.build(lm.model), rates, *limits)
    unseen = Padded(held_out, lm.block_size, lm.pad_token_id)
    validation = (
        hold_out([unseen[i] for i in range(len(unseen))], noise, cfg.mask_rates, cfg.seed) if len(unseen) else None
    )

    kept = (cfg.keep_checkpoints, cfg.keep_best, cfg.async_checkpoints)
    checkpoints = Checkpoints(out / "checkpoints", accelerator, *kept)
    path: Path | None = None
    if start := checkpoints.begin(cfg.resume, progress.say):
        require_same_run(start, "sft", None if isinstance(peft, FullFinetune) else base_fingerprint)
        remembered = load(start, lm.model, trainer.optimizers)
        if start.parent == checkpoints.directory:  # another run's checkpoint may have seen other data
            require_same_data(cfg.data.name, remembered.get("data_fingerprint", data_fingerprint), data_fingerprint)
        trainer.steps_taken, trainer.skipped = remembered["step"], remembered["skipped"]
        trainer.updates_applied = remembered.get("updates_applied", trainer.steps_taken)
        path = start
        progress.say(f"going on after step {trainer.steps_taken}, from {start}")
    main, config = accelerator.is_main_process, OmegaConf.to_container(cfg)
    log = open_log(out, trainer.steps_taken or -1, logger, config) if main else NoLog()
    panels = (*PANELS, Panel("Denoising accuracy, held out", by_rate, percent=True))
    saved_at = trainer.steps_taken

    def save(metrics: dict[str, float]) -> Path:
        """Save the last whole step, of which these were the metrics."""
        remembered = {
            "command": "sft",
            "base_fingerprint": base_fingerprint,
            "data_fingerprint": data_fingerprint,
            "skipped": trainer.skipped,
            "updates_applied": trainer.updates_applied,
        }
        with trainer.times("saving"):
            return checkpoints.save(trainer.steps_taken, lm.model, trainer.optimizers, metrics, **remembered)

    with checkpoints, Grader(workers=1) as grader, stop, progress.after(trainer.steps_taken):
        if validation and not trainer.steps_taken:
            before: dict[str, float] = {}
            with trainer.times("evaluation"), progress.working(MEASURING), suppress(Interrupted):
                before = validation.measure(trainer, cross_entropy, cfg.micro_rows)
            if stop:
                raise stop.end(0, cfg.steps, None)
            log.write(0, before | trainer.times.take())
            progress.note(0, before, "validation_loss", *by_rate)
        while trainer.steps_taken < cfg.steps:
            began = time.perf_counter()
            torch.manual_seed(cfg.seed + trainer.steps_taken)  # for models with dropout
            with trainer.times("rows"):
                rows, answer_tokens = batches[trainer.steps_taken]
                causal = annealing.causal_rows(batches.demonstrations(trainer.steps_taken), noise)
                micro_batches = [one for some in (rows, *causal) for one in trainer.cut(some, cfg.micro_rows)]
            try:
                with progress.working(f"step {trainer.steps_taken + 1}/{cfg.steps}"):
                    metrics = trainer.step(micro_batches, cross_entropy, answer_tokens)
            except Interrupted:  # the step's gradient is given up: it is taken again
                step = trainer.steps_taken
                if step > saved_at:
                    path = save({})
                    log.draw(panels, cfg.name, out / "loss.png")
                checkpoints.wait()
                raise stop.end(step, cfg.steps, path) from None
            tokens = sum(one.num_tokens for one in micro_batches)
            metrics["tokens_per_s"] = tokens / (time.perf_counter() - began)
            metrics |= epochs(order, names, trainer.steps_taken * cfg.batch_size)

            step, is_last = trainer.steps_taken, trainer.steps_taken == cfg.steps
            progress.update(step, metrics)
            if metrics["skipped"]:
                progress.note(step, metrics, "loss", "grad_norm", "skipped")
            if (validation or exam.problems) and (is_last or due(step, cfg.eval_every)):
                with trainer.times("evaluation"), suppress(Interrupted):
                    if validation:
                        with progress.working(MEASURING):
                            metrics |= validation.measure(trainer, cross_entropy, cfg.micro_rows)
                    if exam.problems:
                        sampler_lm = whole(peft.merged(lm), pick_dtype(cfg.dtype, lm.device.type))
                        metrics |= exam.take(NativeSampler(sampler_lm), grader)
                progress.note(step, metrics, "validation_loss", "greedy_accuracy", *by_rate)
            log.write(step, metrics | trainer.times.take())
            must_stop = bool(stop) and not is_last
            is_due = due(step, cfg.save_every) and not trainer.skipped  # else the good ones would make way for bad ones
            if is_last or must_stop or is_due or checkpoints.is_best(metrics):
                path, saved_at = save(metrics), step
            if is_last or must_stop or due(step, cfg.eval_every):
                log.draw(panels, cfg.name, out / "loss.png")
            if must_stop:
                checkpoints.wait()
                raise stop.end(step, cfg.steps, path)

    log.close()
    progress.sum_up(trainer.times.total)
    trainer.require_update("its gradients were skipped or its rates 0 (grad_norm and lr in metrics.jsonl tell which)")
    settings: Any = OmegaConf.to_container(cfg)
    summary = f"{cfg.model.name}, fine-tuned on {cfg.data.name} with `dirl sft`."
    keep(lm, peft, out, summary, settings, RECIPE, panels, decoding, accelerator, progress)


def after_sweep(title: str, jobs: Sequence[tuple[Sequence[str], Path]]) -> None:
    """Show the runs of a sweep together, seeds as their mean."""
    show_sweep(title, jobs, COLUMNS)


def cross_entropy(rows: Rows, logprobs: Tensor, entropy: Tensor) -> Sums:
    """The masked tokens' cross-entropy, weighted as the masking schedule asks."""
    return {"loss": -(rows.weight * logprobs).sum()}
