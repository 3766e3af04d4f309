"""`dirl sft`: hide answer tokens of demonstrations and learn to fill them in. The training is sft/train.py."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
from dirl_cli.data.files import sources_of
from dirl_cli.data.order import MixtureOrder, epochs, generator
from dirl_cli.data.preview import show_examples
from dirl_cli.data.tokens import TokenTable
from dirl_cli.diffusion.reveal_order import TraceWindows
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.held_out import HeldOutEval
from dirl_cli.evaluation.sweep_table import Column, show_sweep
from dirl_cli.models.load import DiffusionLM, fingerprint, in_blocks_of, pick_dtype
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.models.save import require_pushable
from dirl_cli.models.tiny import Tiny
from dirl_cli.plan.forecast import PROMPT
from dirl_cli.plan.memory import LEARNING_ENTROPY, SCORING
from dirl_cli.plan.sft_forecast import FINETUNE, sft_budget
from dirl_cli.report.panels import SFT_PANELS
from dirl_cli.report.plot import Panel
from dirl_cli.report.progress import StepProgress
from dirl_cli.reward.grading import Grader
from dirl_cli.sft.answer_credits import CREDITS, grade_once
from dirl_cli.sft.batches import Noise, NoisedBatches, Padded
from dirl_cli.sft.sampled_answers import SampledAnswers
from dirl_cli.sft.train import train
from dirl_cli.sft.validation import (
    STAGE_LOSS,
    FinetuneEvaluation,
    StageValidation,
    cross_entropy,
    hold_out,
    metric,
)
from dirl_cli.training.block_stages import NOTHING_TELLS, BlockStages, StagedEvaluation
from dirl_cli.training.checkpoint import require_measured
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.optim import AdamW, warmup_remark
from dirl_cli.training.parallel import context_group
from dirl_cli.training.prepare import Questions, Reader, fingerprint_of
from dirl_cli.training.session import Evaluation, Session
from dirl_cli.training.stop_signal import StopSignal
from dirl_cli.training.trainer import Trainer
from dirl_cli.types import Decoding, Instruction

COLUMNS = {
    "loss": Column("loss", 4),
    "validation_loss": Column("validation loss", 4),
    "greedy_accuracy": Column("greedy accuracy %", 1, scale=100),
}
SHOWN = ("loss", "grad_norm", "lr", "adamw_lr", "tokens_per_s")
LEAST_RATE = 1e-4  # at which AdamW gets anywhere from random weights
RECIPE = (
    "model",
    "peft",
    "data",
    "instruction",
    "masking",
    "annealing",
    "certainty",
    "certainty_temperature",
    "optim",
    "schedule",
    "steps",
    "batch_size",
    "max_tokens",
    "clip_norm",
    "seed",
)


@dataclass(frozen=True)
class Demonstrations:
    """What is learned from and measured on. names, weights: of the sources, as `training` and `held_out` have them."""

    names: list[str]
    weights: list[float]
    training: list[TokenTable]
    held_out: list[TokenTable]
    problems: Questions

    def order(self, seed: int) -> MixtureOrder:
        """The endless order in which the training demonstrations come."""
        sizes = tuple(len(tokens) for tokens in self.training)
        return MixtureOrder(sizes, tuple(self.weights), partial(generator, seed))


@dataclass(frozen=True)
class SftParts:
    """What the config's groups describe."""

    model: Any
    peft: Peft
    masking: Any
    annealing: Any
    optim: Any
    schedule: Any
    instruction: Instruction
    decoding: Decoding


def run(cfg: DictConfig, out: Path) -> None:
    """Fine-tune cfg.model on cfg.data until `out`/model holds the result."""
    accelerator, progress = join_processes(cfg, SHOWN)
    if is_finished(cfg, out, progress):
        return

    # Everything that can be refused is refused before the weights are read.
    require_pushable(cfg.push_to_hub)
    source = build(cfg.data)
    parts = build_sft_parts(cfg)
    parts.peft.require()
    lm = shapes_of(cfg, parts.model)
    parts.annealing.check(lm.block_size)
    parts.annealing.require_whole_states(parts.masking)
    parts.annealing.require_evaluations(cfg.eval_every)
    require_order(parts, source, lm)
    decoding = lm.decoding(parts.decoding)
    setup = training_setup(cfg, lm, parts.optim, parts.peft, FINETUNE)
    scoring = LEARNING_ENTROPY if cfg.certainty else SCORING

    # A model that is not here yet can be planned for, by the most that each demonstration may take.
    if cfg.dry_run and lm.tokenizer is None:
        progress.print_line(
            f"no tokenizer of {cfg.model.name} is here, so nothing is known of the data: demonstrations are taken to be"
            f" as long as max_tokens={cfg.max_tokens:,}, and prompts to be {PROMPT:,} tokens"
        )
        lengths = np.array([cfg.max_tokens])
        prompts = [[0] * PROMPT] * cfg.eval_problems
        budget = sft_budget(setup, parts.masking, decoding, lengths, prompts, known=False, scoring=scoring)
        show_budget(budget, cfg, progress)
        return

    data = read_demonstrations(cfg, out, source, parts.instruction, lm, accelerator, progress)
    del source  # and its rows
    if cfg.dry_run:
        preview(cfg, data, lm, progress)
    require_measured(cfg.keep_best, sft_metrics(cfg, data))
    lengths = np.concatenate([tokens.lengths for tokens in data.training])
    budget = sft_budget(setup, parts.masking, decoding, lengths, data.problems.prompts, scoring=scoring)
    if cfg.dry_run:
        show_budget(budget, cfg, progress)
        return
    warn(cfg, parts, budget.warnings(), progress)

    lm = load_model(cfg, parts.model, parts.peft, accelerator, progress)
    stages = parts.annealing.stages(lm.block_size, STAGE_LOSS)
    stop = StopSignal(accelerator)
    with Grader(workers=1) as grader:
        session, batches, evaluation = open_training(
            cfg, out, parts, data, lm, stop, grader, stages, accelerator, progress
        )
        with session:
            # Where blocks grow by what is held out, an evaluation says how a step's rows are cut.
            prefetch = stages is None
            train(session, batches, parts.annealing, cfg.certainty, evaluation, cfg.micro_rows, prefetch)
    session.trainer.require_update(
        "its gradients were skipped or its rates 0 (grad_norm and lr in metrics.jsonl tell which)"
    )
    if stages and stages.size(cfg.steps - 1) != lm.block_size:  # the run ended before the last stage
        lm = in_blocks_of(lm, stages.size(cfg.steps - 1))
        cfg.model.block_size = lm.block_size  # which the cards name
        decoding = lm.decoding(parts.decoding)
    leave_model(cfg, out, session, lm, parts.peft, decoding, RECIPE)


def build_sft_parts(cfg: DictConfig) -> SftParts:
    """What the config's groups describe, all but the data."""
    return SftParts(
        model=build(cfg.model),
        peft=build(cfg.peft),
        masking=build(cfg.masking),
        annealing=build(cfg.annealing),
        optim=build(cfg.optim),
        schedule=build(cfg.schedule),
        instruction=build(cfg.instruction, Instruction),
        decoding=build(cfg.decoding, Decoding),
    )


def require_order(parts: SftParts, source: Any, lm: DiffusionLM) -> None:
    """Raises DirlError where states of a trace are to be learned of answers that have none in the run's blocks."""
    if not isinstance(parts.masking, TraceWindows):
        return
    if not isinstance(source, SampledAnswers):
        raise DirlError(
            f"masking=trace follows the order in which sampled answers were revealed, which data={source.name} does not"
            " tell: give data=RUN, a run of `dirl rl` or `dirl generate`, or another masking"
        )
    source.require_blocks([*parts.annealing.block_sizes, lm.block_size])


def read_demonstrations(
    cfg: DictConfig,
    out: Path,
    source: Any,
    instruction: Instruction,
    lm: DiffusionLM,
    accelerator: Accelerator,
    progress: StepProgress,
) -> Demonstrations:
    """The data as tokens. Raises DirlError where nothing of one of its sources is left to learn from."""
    reader = Reader(lm, instruction, accelerator, progress, cfg.max_tokens)
    if isinstance(source, SampledAnswers):
        return read_sampled_answers(cfg, out, source, lm, accelerator, progress)

    sources, weights = sources_of(source)
    names = [one.name for one in sources]
    training = [reader.demonstrations(f"training demonstrations of {s.name}", s.demonstrations()) for s in sources]
    held_out = [reader.demonstrations(f"held-out demonstrations of {s.name}", s.validation()) for s in sources]

    # Without one of its sources a mixture would be another than was asked for.
    for name, tokens in zip(names, training, strict=True):
        if not len(tokens):
            raise DirlError(f"nothing of {name} is left to learn from: raise max_tokens, or give other data")
    problems = reader.problems("held-out problems", source.problems()[: cfg.eval_problems])
    return Demonstrations(names, list(weights), training, held_out, problems)


def read_sampled_answers(
    cfg: DictConfig,
    out: Path,
    source: SampledAnswers,
    lm: DiffusionLM,
    accelerator: Accelerator,
    progress: StepProgress,
) -> Demonstrations:
    """Sampled answers as the tokens that they are. Raises DirlError where none is left to learn from."""
    file = None if cfg.dry_run else out / CREDITS
    grade = partial(grade_once, file=file, accelerator=accelerator)
    with progress.working(f"reading the answers of {source.path}"):
        answers = source.tables(lm, grade, min(cfg.max_tokens, lm.max_length))
    for remark in answers.remarks:
        progress.print_line(remark)
    if not len(answers.training):
        raise DirlError(
            f"no answer of {source.path} is left to learn from: lower data.least_reward (-.inf keeps all, be they"
            " graded or not), raise max_tokens, or give other answers"
        )

    # They are asked as they were when the answers were sampled.
    asked = source.questions()[: cfg.eval_problems]
    if asked:
        progress.print_line(f"{len(asked):,} held-out problems")
    questions = Questions([problem for problem, _ in asked], [prompt for _, prompt in asked])
    return Demonstrations([source.name], [1.0], [answers.training], [answers.held_out], questions)


def preview(cfg: DictConfig, data: Demonstrations, lm: DiffusionLM, progress: StepProgress) -> None:
    """Show the first demonstrations of each source as the model sees them, and how often each will be gone through."""
    show_examples(dict(zip(data.names, data.training, strict=True)), lm.require_tokenizer(), progress.console)
    reached = epochs(data.order(cfg.seed), data.names, cfg.steps * cfg.batch_size)
    counts = " · ".join(f"{name} {n:.2f}" for name, n in reached.items())
    progress.print_line(f"after {cfg.steps} steps: {counts}")


def sft_metrics(cfg: DictConfig, data: Demonstrations) -> list[str]:
    """The metrics that may tell which checkpoint is the best."""
    metrics = ["loss"]
    if any(map(len, data.held_out)):
        metrics += ["validation_loss", *map(metric, cfg.mask_rates)]
    if data.problems.problems:
        metrics.append("greedy_accuracy")
    return metrics


def warn(cfg: DictConfig, parts: SftParts, warnings: Iterable[str], progress: StepProgress) -> None:
    """Say what is likely not meant."""
    for warning in warnings:
        progress.warn(warning)
    if isinstance(parts.model, Tiny) and isinstance(parts.optim, AdamW) and parts.optim.lr < LEAST_RATE:
        progress.warn(
            f"optim.lr={parts.optim.lr} is for a published checkpoint, and this model begins at random: give 1e-3"
        )
    if remark := warmup_remark(parts.schedule, cfg.steps):
        progress.print_line(remark)


def open_training(
    cfg: DictConfig,
    out: Path,
    parts: SftParts,
    data: Demonstrations,
    lm: DiffusionLM,
    stop: StopSignal,
    grader: Grader,
    stages: BlockStages | None,
    accelerator: Accelerator,
    progress: StepProgress,
) -> tuple[Session, NoisedBatches, Evaluation | None]:
    """The run where it goes on, its batches, and what it is measured by."""
    fingerprints = {
        "base_fingerprint": fingerprint(lm.model),
        "data_fingerprint": fingerprint_of([*data.training, *data.held_out]),
    }
    # A batch is a function of its number, and where blocks grow by what is held out of the stage that a checkpoint
    # keeps: so a run goes on with what it would have seen.
    noise = Noise(parts.masking, lm.block_size, lm.mask_token_id, lm.pad_token_id, cfg.row_tokens)
    batches = NoisedBatches(
        Padded(data.training, lm.block_size, lm.pad_token_id),
        data.order(cfg.seed),
        cfg.batch_size,
        lambda step: parts.annealing.noise(noise, step / cfg.steps, stages.size(step) if stages else None),
        cfg.seed,
        data.names,
    )
    entropy_temperature = cfg.certainty_temperature if cfg.certainty else None
    context = context_group(accelerator, cfg.context_parallel)
    trainer = Trainer(
        accelerator,
        LogprobModel(lm.model, entropy_temperature=entropy_temperature, context=context),
        parts.optim.build(lm.model),
        partial(parts.schedule, steps=cfg.steps),
        cfg.clip_norm,
        cfg.max_skipped,
        cfg.skip_norm,
        stop.raising_if_alone,
        context=context,
    )

    validation = validation_of(cfg, data, lm, noise, stages, trainer)
    questions = data.problems
    decoding = lm.decoding(parts.decoding)
    held_out = HeldOutEval(questions.problems, questions.prompts, lm, decoding, accelerator, progress, stop.raising)
    dtype = pick_dtype(cfg.dtype, lm.device.type)
    evaluation: Evaluation | None = None
    if validation or questions.problems:
        evaluation = FinetuneEvaluation(
            validation, "held-out demonstrations", held_out, lm, parts.peft, grader, dtype, progress
        )

    # The log is opened last: where the run goes on tells which of its lines stay.
    by_rate = {metric(rate): f"{rate:.0%} masked" for rate in cfg.mask_rates}
    panels = (*SFT_PANELS, Panel("Denoising accuracy, held out", by_rate, percent=True))
    noted = ("validation_loss", STAGE_LOSS, "greedy_accuracy", *by_rate)
    session = open_session(cfg, out, "sft", trainer, lm, progress, stop, panels, noted, fingerprints)
    remembered = session.resume(cfg.resume, needs_base=parts.peft != FullFinetune(), data=cfg.data.name)
    open_run_log(cfg, out, session)
    if stages and evaluation:
        if remembered and "stages" in remembered:
            stages.restore(remembered["stages"])
        session.state = lambda: {"block_size": trained_size(stages, trainer), "stages": stages.to_json()}
        evaluation = StagedEvaluation(evaluation, stages, lambda: session.step)
    return session, batches, evaluation


def validation_of(
    cfg: DictConfig,
    data: Demonstrations,
    lm: DiffusionLM,
    noise: Noise,
    stages: BlockStages | None,
    trainer: Trainer,
) -> Callable[[], dict[str, float]] | None:
    """What measures held-out demonstrations; None where there are none, which growing blocks cannot do without.

    They are hidden once, under the noise of the run's end, so that their losses compare.
    """
    unseen = Padded(data.held_out, lm.block_size, lm.pad_token_id)
    if not len(unseen):
        if stages:
            raise DirlError(NOTHING_TELLS)
        return None

    examples = [unseen[i] for i in range(len(unseen))]
    in_the_end = hold_out(examples, noise, cfg.mask_rates, cfg.seed)
    measure = in_the_end.measure
    if stages:
        size = partial(trained_size, stages, trainer)
        measure = StageValidation(in_the_end, examples, noise, cfg.seed, size).measure
    return partial(measure, trainer, cross_entropy, cfg.micro_rows)


def trained_size(stages: BlockStages, trainer: Trainer) -> int:
    """The block size of the last step that was finished, or of the first."""
    return stages.trained_size(trainer.steps_taken)


def after_sweep(title: str, jobs: Sequence[tuple[Sequence[str], Path]]) -> None:
    """Show the runs of a sweep together, seeds as their mean."""
    show_sweep(title, jobs, COLUMNS)
