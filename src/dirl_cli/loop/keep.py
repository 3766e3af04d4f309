"""What a training run leaves: the model with its card, on the disk and where it is asked for on the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dirl_cli.models.card import model_card
from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.models.push import push
from dirl_cli.training.checkpoint import save_model
from dirl_cli.training.metrics import curves
from dirl_cli.training.plot import Panel
from dirl_cli.training.progress import StepProgress
from dirl_cli.types import Decoding


def keep(
    lm: DiffusionLM,
    run: Path,
    summary: str,
    settings: Mapping[str, Any],
    recipe: Sequence[str],
    panels: Sequence[Panel],
    decoding: Decoding,
    accelerator: Accelerator,
    progress: StepProgress,
) -> None:
    """Save `run`/model, its card made of the settings named in `recipe` and of what `panels` show; then push it."""
    repository, saved = settings["push_to_hub"], run / "model"
    card = model_card(
        settings["name"],
        repository,
        summary,
        settings["model"].get("path"),
        {name: settings[name] for name in recipe},
        curves(run / "metrics.jsonl", panels),
        asdict(decoding) | {"block_size": lm.block_size, "mask_token_id": lm.mask_token_id},
    )
    save_model(lm, settings["dtype"], saved, card, accelerator)
    progress.say(f"the model is in {saved}: run `dirl eval model={saved}`")
    if repository and accelerator.is_main_process:
        progress.say(f"and at {push(saved, repository)}")
