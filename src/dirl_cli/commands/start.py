"""What `dirl sft`, `dirl rl` and `dirl dpo` do alike around their training."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from dirl_cli.cli.build import build, build_choice
from dirl_cli.errors import DirlError
from dirl_cli.models.context import require_shared_heads
from dirl_cli.models.load import LEAST_HEAD, DiffusionLM, pick_attention, pick_dtype
from dirl_cli.models.peft import ModelSource, Peft
from dirl_cli.models.shapes import outline, shapes
from dirl_cli.plan.budget import Budget, Machine
from dirl_cli.plan.devices import device_here, find_device
from dirl_cli.plan.forecast import TrainingSetup
from dirl_cli.plan.time import FIXED, NOTHING_ASSUMED, Assumptions
from dirl_cli.report.metrics_log import open_log
from dirl_cli.report.plot import Panel
from dirl_cli.report.progress import StepProgress
from dirl_cli.text import shell_word
from dirl_cli.training.checkpoint import RunCheckpoints
from dirl_cli.training.export import export_model
from dirl_cli.training.layers import checkpoint_layers, compile_layers, compile_seconds, is_compiled, pick_compile
from dirl_cli.training.optim import Optim
from dirl_cli.training.parallel import start_accelerator
from dirl_cli.training.session import Session
from dirl_cli.training.sharded_model import load_sharded
from dirl_cli.training.stop_signal import StopSignal
from dirl_cli.training.trainer import Trainer
from dirl_cli.types import Decoding

RECORDED = 20  # last lines of a run's metrics that tell how long its answers are

COMPILING_TAKES = {"cuda": "some 10 s each", "cpu": "up to a minute"}  # for rows of one kind, with gradients or not


def join_processes(cfg: DictConfig, shown: Sequence[str]) -> tuple[Accelerator, StepProgress]:
    """This process among those of the run, and its display of steps, quiet in all but one."""
    if cfg.dry_run:
        accelerator = start_accelerator("cpu", cfg.dtype)
    else:
        accelerator = start_accelerator(cfg.device, cfg.dtype, cfg.launch)
    return accelerator, StepProgress(cfg.steps, cfg.log_every, shown, quiet=not accelerator.is_main_process)


def is_finished(cfg: DictConfig, out: Path, progress: StepProgress) -> bool:
    """Whether the run has left its model before, which is then said."""
    saved = out / "model"
    if cfg.dry_run or not saved.exists():
        return False
    progress.print_line(
        f"{out} is finished: run `dirl eval {shell_word('model', saved)}`, or give another name= to train again"
    )
    return True


def shapes_of(cfg: DictConfig, model: ModelSource) -> DiffusionLM:
    """The model without its weights, which come once they are known to fit."""
    if cfg.dry_run:  # which plans for a model that is still to be downloaded, too
        return outline(model, cfg.attention)
    return shapes(model, cfg.attention)


def planned_machine(cfg: DictConfig, memory_gb: float | None) -> Machine:
    """The devices that a run is planned for: those here, or in a dry run those that `plan.device` names."""
    device = cfg.device
    if cfg.dry_run and cfg.plan.device:
        device = "cuda"
        memory_gb = memory_gb or find_device(cfg.plan.device).memory_gb
    return Machine(device, cfg.dtype, cfg.attention, cfg.gpus * cfg.nodes, memory_gb)


def planned_time(cfg: DictConfig, machine: Machine, recorded: Assumptions) -> Assumptions:
    """What a dry run's plan of time takes for granted; keys go before what is recorded. Nothing of any other run.

    Raises DirlError for a speed where the decoding strategy says it.
    """
    if not cfg.dry_run:
        return NOTHING_ASSUMED
    if cfg.plan.tokens_per_forward and cfg.decoding.strategy in FIXED:
        raise DirlError(
            f"plan.tokens_per_forward: decoding.strategy={cfg.decoding.strategy} reveals as many as"
            " decoding.denoising_steps says, so leave it out"
        )
    device = None
    if cfg.plan.device:
        device = find_device(cfg.plan.device)
    elif machine.kind == "cuda":
        device = device_here()
    return Assumptions(
        device,
        cfg.plan.length or recorded.length,
        cfg.plan.tokens_per_forward or recorded.tokens_per_forward,
        "" if cfg.plan.length and cfg.plan.tokens_per_forward else recorded.source,
        cfg.price_per_gpu_hour,
    )


def recorded_answers(run: Path) -> Assumptions:
    """The answers of a run's last rollouts, as its metrics have them; nothing where there are none."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return NOTHING_ASSUMED
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a torn last line
            metrics = json.loads(line)
            if "tokens_per_forward" in metrics and "length" in metrics:
                lines.append(metrics)
    if not lines:
        return NOTHING_ASSUMED
    last = lines[-RECORDED:]
    return Assumptions(
        length=max(1, round(fmean(line["length"] for line in last))),
        tokens_per_forward=fmean(line["tokens_per_forward"] for line in last),
        source=f"as {run} recorded",
    )


def training_setup(
    cfg: DictConfig,
    lm: DiffusionLM,
    optim: Optim,
    peft: Peft,
    keys: Sequence[str],
    recorded: Assumptions = NOTHING_ASSUMED,
) -> TrainingSetup:
    """What the memory budget of the run on this machine depends on, and in a dry run its time.

    keys: the settings it may propose to change. recorded: what is known of its answers.
    Raises DirlError where attention heads cannot be divided as asked.
    """
    require_shared_heads(lm.model.config, cfg.context_parallel)
    machine = planned_machine(cfg, cfg.memory_gb)
    settings = {key: OmegaConf.select(cfg, key) for key in keys}
    # Where the package for it is installed, an adapter may be proposed instead of full fine-tuning.
    adapter = None
    if find_spec("peft"):
        adapter = partial(build_choice, "peft")
    return TrainingSetup(lm, optim, machine, settings, peft, adapter, planned_time(cfg, machine, recorded))


def show_budget(budget: Budget, cfg: DictConfig, progress: StepProgress) -> None:
    budget.show(OmegaConf.to_container(cfg), progress.console)


def load_model(
    cfg: DictConfig, model: ModelSource, peft: Peft, accelerator: Accelerator, progress: StepProgress
) -> DiffusionLM:
    """The model as it is trained, on this process's device."""
    with progress.working("loading the model"):
        lm = load_on_device(cfg, partial(peft.load, model), accelerator)
    if lm.model.config._attn_implementation != pick_attention(cfg.attention, lm.device.type):
        progress.print_line(f"attention=sdpa, as FlexAttention wants heads of at least {LEAST_HEAD} values on a GPU")
    checkpoint_layers(lm.model, cfg.gradient_checkpointing)
    compile_as_asked(cfg, lm.model)
    if is_compiled(lm.model):
        progress.print_line(f"compiling: the first steps take {COMPILING_TAKES[lm.device.type]} longer, once a start")
    return lm


def load_on_device(
    cfg: DictConfig, load: Callable[[str, str, str], DiffusionLM], accelerator: Accelerator
) -> DiffusionLM:
    """What `load` gives of dtype, device and attention, on this process's device; shared where `launch` says so."""
    device = accelerator.device
    if not accelerator.is_fsdp2:
        return load(cfg.dtype, str(device), cfg.attention)
    dtype = str(pick_dtype(cfg.dtype, device.type)).removeprefix("torch.")
    return load_sharded(partial(load, dtype, "cpu", cfg.attention), accelerator, cfg.attention)


def compile_as_asked(cfg: DictConfig, model: PreTrainedModel) -> None:
    """Compile the layers of a model that is in a run, where its `compile` says so."""
    if pick_compile(cfg.compile, model.device.type):
        compile_layers(model)


def open_session(
    cfg: DictConfig,
    out: Path,
    command: str,
    trainer: Trainer,
    lm: DiffusionLM,
    progress: StepProgress,
    stop: StopSignal,
    panels: Sequence[Panel],
    noted: Sequence[str],
    fingerprints: Mapping[str, str],
) -> Session:
    """The run in `out`, not gone on with yet. noted: metrics of an evaluation that get a line of their own."""
    if is_compiled(lm.model):
        trainer.times.watch("compilation", compile_seconds)
    checkpoints = RunCheckpoints(
        out / "checkpoints",
        trainer.accelerator,
        keep=cfg.keep_checkpoints,
        best=cfg.keep_best,
        in_background=cfg.async_checkpoints,
    )
    return Session(
        command=command,
        name=cfg.name,
        steps=cfg.steps,
        seed=cfg.seed,
        save_every=cfg.save_every,
        eval_every=cfg.eval_every,
        trainer=trainer,
        model=lm.model,
        checkpoints=checkpoints,
        progress=progress,
        stop=stop,
        panels=panels,
        picture=out / ("loss.png" if command == "sft" else f"{command}.png"),
        noted=noted,
        fingerprints=fingerprints,
    )


def open_run_log(cfg: DictConfig, out: Path, run: Session) -> None:
    """Open the run's metrics where it goes on, in the process that writes them."""
    if run.trainer.accelerator.is_main_process:
        run.log = open_log(out, run.logged, build(cfg.logger), OmegaConf.to_container(cfg))


def leave_model(
    cfg: DictConfig, out: Path, run: Session, lm: DiffusionLM, peft: Peft, decoding: Decoding, recipe: Sequence[str]
) -> None:
    """Write the run's model and its card. recipe: the settings that are on the card."""
    how = {"sft": "fine-tuned", "rl": "reinforced", "dpo": "aligned"}[run.command]
    command = f"dirl {run.command}"
    rows = cfg.data.name
    if run.command == "rl":
        command += f" algo={cfg.algo.name}"
    elif run.command == "dpo" and cfg.dpo.pairs_from:
        rows = f"the answers of {cfg.dpo.pairs_from}"
    summary = f"{cfg.model.name}, {how} on {rows} with `{command}`."
    settings: Any = OmegaConf.to_container(cfg)
    export_model(lm, peft, out, summary, settings, recipe, run.panels, decoding, run.trainer.accelerator, run.progress)
