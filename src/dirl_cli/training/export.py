"""What a training run leaves: the model with its card, on the disk and where it is asked for on the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dirl_cli.models.load import DiffusionLM, pick_dtype
from dirl_cli.models.model_card import adapter_card, model_card
from dirl_cli.models.peft import Peft
from dirl_cli.models.save import push
from dirl_cli.models.sharded_tensors import is_sharded, unsharded
from dirl_cli.report.metrics_log import metric_curves
from dirl_cli.report.plot import Panel
from dirl_cli.report.progress import StepProgress
from dirl_cli.text import shell_word
from dirl_cli.training.sharded_model import skeleton
from dirl_cli.types import Decoding


def export_model(
    lm: DiffusionLM,
    peft: Peft,
    run: Path,
    summary: str,
    settings: Mapping[str, Any],
    recipe: Sequence[str],
    panels: Sequence[Panel],
    decoding: Decoding,
    accelerator: Accelerator,
    progress: StepProgress,
) -> None:
    """Save `run`/model, its card made of the settings named in `recipe` and of what `panels` show; then push it.

    What `peft` trained beside the weights is saved in `run`/adapter, too.
    """
    base = settings["model"].get("path")
    shown_settings = {name: settings[name] for name in recipe}
    save_adapter(lm, peft, run / "adapter", summary, settings, shown_settings, accelerator.is_main_process)

    repository = settings["push_to_hub"]
    card = model_card(
        settings["name"],
        repository,
        summary,
        base,
        shown_settings,
        metric_curves(run / "metrics.jsonl", panels),
        asdict(decoding) | {"block_size": lm.block_size, "mask_token_id": lm.mask_token_id},
        lm.model.config,
    )

    saved = run / "model"
    dtype = pick_dtype(settings["dtype"], str(lm.device))
    if is_sharded(lm.model):
        save_sharded(lm, peft, dtype, saved, card, accelerator)
    else:
        device = "cpu" if accelerator.is_main_process else "meta"  # the others need no memory for what is merged
        save_model(peft.merged(lm, device), dtype, saved, card, accelerator)
    progress.print_line(f"the model is in {saved}: run `dirl eval {shell_word('model', saved)}`")
    if repository and accelerator.is_main_process:
        progress.print_line(f"and at {push(saved, repository)}")


def save_adapter(
    lm: DiffusionLM,
    peft: Peft,
    directory: Path,
    summary: str,
    settings: Mapping[str, Any],
    shown_settings: Mapping[str, Any],
    writes: bool,
) -> None:
    """Save what `peft` trained beside the weights, if anything, with a card. shown_settings: those that the card shows.

    The adapter names the base model that it is loaded onto, unless that was changed before training: weights with
    another adapter merged into them have no name.
    """
    model = settings["model"]
    base = model.get("path")
    merged_first = model.get("adapter")
    if merged_first:
        summary = f"{summary} It stands beside {base} with {merged_first} merged into it."
    if not base or merged_first:
        peft.save(lm, directory, None, adapter_card(settings["name"], summary, None, shown_settings), writes)
    else:
        peft.save(lm, directory, base, adapter_card(settings["name"], summary, model, shown_settings), writes)


def save_model(lm: DiffusionLM, dtype: torch.dtype, directory: Path, card: str, accelerator: Accelerator) -> None:
    """Write the trained model in the published layout, its weights as `dtype`, which they keep from now on."""
    nn.Module.to(lm.model, dtype=dtype)
    if accelerator.is_main_process:
        lm.save(directory, card)
    accelerator.wait_for_everyone()


def save_sharded(
    lm: DiffusionLM, peft: Peft, dtype: torch.dtype, directory: Path, card: str, accelerator: Accelerator
) -> None:
    """Write a trained model that processes share, likewise; one of them holds all of it, in its CPU's memory."""
    state = {}
    for name, weight in unsharded(peft.pushed(lm)):
        if accelerator.is_main_process:
            state[name] = weight.detach().to(dtype).cpu()
    if accelerator.is_main_process:
        model = nn.Module.to(skeleton(lm), dtype=dtype)
        replace(lm, model=model).save(directory, card, state)
    accelerator.wait_for_everyone()
