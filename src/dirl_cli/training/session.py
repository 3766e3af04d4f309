"""What a training run leaves: the model with its card, on the disk and where it is asked for on the Hub."""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from dirl_cli.errors import STOP_CODES, Interrupted, Stopped
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.model_card import adapter_card, model_card
from dirl_cli.models.peft import Peft
from dirl_cli.models.save import push
from dirl_cli.report.metrics_log import curves
from dirl_cli.report.plot import Panel
from dirl_cli.report.progress import StepProgress
from dirl_cli.text import shell_word
from dirl_cli.training.checkpoint import save_model
from dirl_cli.types import Decoding

HEARD = "asked to stop: what is finished is saved first; another Ctrl-C ends it at once\n"


class StopSignal:
    """Remembers that the run was asked to stop. A second Ctrl-C ends it at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = 0  # the signal, by this process
        self.agreed = 0  # by any, when all last looked; another one may come while they do
        self.raises = False

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.receive) for number in STOP_CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if first and self.accelerator.is_main_process:
            os.write(2, HEARD.encode())  # since a print may be under way
        if self.raises:
            self.raises = False
            raise Interrupted(number)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, a wish to stop raises Interrupted. Only for what waits for no other process and changes nothing."""
        if self.received:
            raise Interrupted(self.received)
        self.raises = True
        try:
            yield
        finally:
            self.raises = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """As `apart` in a run of one process; where there are several, which wait for each other, it waits too."""
        if self.accelerator.num_processes > 1:
            yield
        else:
            with self.apart():
                yield

    def __bool__(self) -> bool:
        """Whether any process was asked; every process gets the same answer."""
        asked = torch.tensor([self.received], device=self.accelerator.device)
        self.agreed = int(self.accelerator.gather(asked).max())
        return self.agreed > 0

    def end(self, step: int, steps: int, saved: Path | None) -> Stopped:
        """What ends the run after a step of all, which is saved in a directory; step 0 has nothing to save."""
        where = f"after step {step} of {steps}, saved in {saved}" if step else "before the end of the first step"
        number = signal.Signals(self.agreed or self.received)
        return Stopped(f"stopped {where}: the same command goes on", STOP_CODES[number])


def keep(
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
        curves(run / "metrics.jsonl", panels),
        asdict(decoding) | {"block_size": lm.block_size, "mask_token_id": lm.mask_token_id},
        lm.model.config,
    )
    where = "cpu" if accelerator.is_main_process else "meta"  # one process saves
    save_model(peft.merged(lm, where), settings["dtype"], saved, card, accelerator)
    progress.say(f"the model is in {saved}: run `dirl eval {shell_word('model', saved)}`")
    if repository and accelerator.is_main_process:
        progress.say(f"and at {push(saved, repository)}")
