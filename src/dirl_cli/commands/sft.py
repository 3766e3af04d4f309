"""`dirl sft`: hide answer tokens of demonstrations and learn to fill them in."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dirl_cli.build import build
from dirl_cli.data.chat import encode_demonstrations
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.masking import Example, example
from dirl_cli.errors import DirlError
from dirl_cli.loop.exam import exam
from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.reward.grading import Grader
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.batches import Noise, NoisedBatches
from dirl_cli.training.checkpoint import Checkpoints, find, load, save_model
from dirl_cli.training.interrupt import StopSignal
from dirl_cli.training.logprobs import TokenScorer
from dirl_cli.training.metrics import NoLog, open_log
from dirl_cli.training.plot import Panel
from dirl_cli.training.progress import StepProgress, clock, describe, due, shares
from dirl_cli.training.trainer import Sums, Trainer, start_accelerator
from dirl_cli.types import Decoding

PANELS = (
    Panel("Loss per answer token", {"loss": "training", "validation_loss": "validation"}, log=True),
    Panel("Greedy accuracy", {"greedy_accuracy": "accuracy"}, percent=True),
    Panel("Learning rate", {"lr": "learning rate"}, smooth=False),
    Panel("Gradient norm", {"grad_norm": "gradient norm"}),
    Panel("Tokens per second", {"tokens_per_s": "tokens"}),
)
SHOWN = ("loss", "grad_norm", "lr", "tokens_per_s")


def run(cfg: DictConfig, out: Path) -> None:
    """Fine-tune cfg.model on cfg.data until `out`/model holds the result."""
    accelerator = start_accelerator(cfg.device, cfg.dtype)
    progress = StepProgress(cfg.steps, cfg.log_every, SHOWN, quiet=not accelerator.is_main_process)
    saved = out / "model"
    if saved.exists():
        progress.say(f"{out} is finished: run `dirl eval model={saved}`, or give another name= to train again")
        return

    model, data, masking, optim, schedule, logger = (
        build(cfg[name]) for name in ("model", "data", "masking", "optim", "schedule", "logger")
    )
    decoding = build(cfg.decoding, Decoding)
    lm: DiffusionLM = model.load("float32", str(accelerator.device), cfg.attention)
    decoding = replace(decoding, stop_token_ids=decoding.stop_token_ids or lm.stop_token_ids)
    examples = tokenise(lm, data.demonstrations(), cfg.max_tokens, "training", progress)
    held_out = tokenise(lm, data.validation(), cfg.max_tokens, "held-out", progress)
    if not examples:
        raise DirlError(f"no demonstration has at most max_tokens={cfg.max_tokens} tokens: raise it")
    noise = Noise(masking, lm.block_size, lm.mask_token_id, lm.pad_token_id, cfg.row_tokens)
    batches = NoisedBatches(examples, cfg.batch_size, noise, cfg.seed)

    rates = partial(schedule, steps=cfg.steps)
    trainer = Trainer(accelerator, TokenScorer(lm.model), optim.build(lm.model), rates, cfg.clip_norm)
    validation = noise.rows(held_out, cfg.seed) if held_out else None
    questions = exam(data.problems()[: cfg.eval_problems], data.instruction, lm, decoding, accelerator)

    checkpoints = Checkpoints(out / "checkpoints", cfg.keep_checkpoints, accelerator)
    given = find(cfg.resume)
    if start := checkpoints.latest() or given:
        trainer.steps_taken = load(start, lm.model, trainer.optimizers)["step"]
        progress.say(f"going on after step {trainer.steps_taken}, from {start}")
    main, config = accelerator.is_main_process, OmegaConf.to_container(cfg)
    log = open_log(out, trainer.steps_taken, logger, config) if main else NoLog()

    sampler = NativeSampler(lm)
    with Grader(workers=1) as grader, StopSignal(accelerator) as stop, progress.after(trainer.steps_taken):
        while trainer.steps_taken < cfg.steps:
            began = time.perf_counter()
            torch.manual_seed(cfg.seed + trainer.steps_taken)  # for models with dropout
            with trainer.times("rows"):
                rows, answer_tokens = batches[trainer.steps_taken]
                micro_batches = trainer.cut(rows, cfg.micro_rows)
            metrics = trainer.step(micro_batches, cross_entropy, answer_tokens)
            metrics["tokens_per_s"] = rows.num_tokens / (time.perf_counter() - began)
            metrics["epoch"] = trainer.steps_taken * cfg.batch_size / len(examples)

            step, is_last = trainer.steps_taken, trainer.steps_taken == cfg.steps
            progress.update(step, metrics)
            if is_last or due(step, cfg.eval_every):
                with trainer.times("evaluation"):
                    metrics |= validated(trainer, validation, cfg.micro_rows) | questions.take(sampler, grader)
                progress.say(f"step {step}/{cfg.steps} · {describe(metrics, 'validation_loss', 'greedy_accuracy')}")
            log.write(step, metrics | trainer.times.take())
            must_stop = bool(stop) and not is_last
            if is_last or must_stop or due(step, cfg.save_every):
                with trainer.times("saving"):
                    path = checkpoints.save(step, lm.model, trainer.optimizers)
            if is_last or must_stop or due(step, cfg.eval_every):
                log.draw(PANELS, cfg.name, out / "loss.png")
            if must_stop:
                raise DirlError(f"stopped after step {step} of {cfg.steps}, saved in {path}: the same command goes on")

    save_model(lm, cfg.dtype, saved, accelerator)
    log.close()
    times = trainer.times.total
    progress.say(f"{clock(sum(times.values()))} went into {shares(times)}")
    progress.say(f"the model is in {saved}: run `dirl eval model={saved}`")


def tokenise(
    lm: DiffusionLM, rows: Sequence[dict], max_tokens: int, kind: str, progress: StepProgress
) -> list[Example]:
    """The demonstrations as tokens, those left out that are too long; says how many there are of both."""
    longest = min(max_tokens, lm.max_length)
    encoded = encode_demonstrations(lm.require_tokenizer(), rows)
    fitting = [(ids, trained) for ids, trained in encoded if len(ids) <= longest]
    limit = f"max_tokens={longest}" if longest == max_tokens else f"the model's {longest} positions"
    left_out = f"; {len(encoded) - len(fitting):,} left out, longer than {limit}" if len(fitting) < len(encoded) else ""
    if encoded:
        tokens = sum(len(ids) for ids, _ in fitting)
        progress.say(f"{len(fitting):,} {kind} demonstrations, {tokens:,} tokens{left_out}")
    return [example(ids, trained, lm.block_size, lm.pad_token_id) for ids, trained in fitting]


def validated(trainer: Trainer, validation: tuple[Rows, int] | None, micro_rows: int | None) -> dict[str, float]:
    """`validation_loss` on held-out demonstrations, whose noise is always the same; nothing without any."""
    if validation is None:
        return {}
    rows, answer_tokens = validation
    return {"validation_loss": trainer.measure(trainer.cut(rows, micro_rows), cross_entropy, answer_tokens)["loss"]}


def cross_entropy(rows: Rows, logprobs: Tensor, entropy: Tensor) -> Sums:
    """The masked tokens' cross-entropy, weighted as the masking schedule asks."""
    return {"loss": -(rows.weight * logprobs).sum()}
