"""What a training run leaves: the model with its card, on the disk and where it is asked for on the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.model_card import adapter_card, model_card
from dirl_cli.models.peft import Peft
from dirl_cli.models.save import push
from dirl_cli.report.metrics_log import metric_curves
from dirl_cli.report.plot import Panel
from dirl_cli.report.progress import StepProgress
from dirl_cli.text import shell_word
from dirl_cli.training.checkpoint import save_model
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
    repository, saved, base = settings["push_to_hub"], run / "model", settings["model"].get("path")
    chosen = {name: settings[name] for name in recipe}
    if accelerator.is_main_process:
        merged_first = settings["model"].get("adapter")
        told = f"{summary} It stands beside {base} with {merged_first} merged into it." if merged_first else summary
        beside = settings["model"] if base and not merged_first else None
        readme = adapter_card(settings["name"], told, beside, chosen)
        peft.save(lm, run / "adapter", base if beside else None, readme)
    card = model_card(
        settings["name"],
        repository,
        summary,
        base,
        chosen,
        metric_curves(run / "metrics.jsonl", panels),
        asdict(decoding) | {"block_size": lm.block_size, "mask_token_id": lm.mask_token_id},
        lm.model.config,
    )
    where = "cpu" if accelerator.is_main_process else "meta"  # one process saves
    save_model(peft.merged(lm, where), settings["dtype"], saved, card, accelerator)
    progress.print_line(f"the model is in {saved}: run `dirl eval {shell_word('model', saved)}`")
    if repository and accelerator.is_main_process:
        progress.print_line(f"and at {push(saved, repository)}")
