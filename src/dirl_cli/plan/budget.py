"""Whether a run fits the memory there is, and if not, the smallest change of its settings that makes it fit."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from dirl_cli.errors import DirlError, DoesNotFit
from dirl_cli.models.load import pick_device
from dirl_cli.plan.duration import Duration
from dirl_cli.plan.memory import Bytes
from dirl_cli.plan.time import TimePlan, no_time

# What fits leaves a twentieth free, for what no plan counts: fragments, the allocator's rounding, libraries.
SPARE = 0.95
# What is refused would not fit either if the estimate were so much too high: a plan that errs should not stop a run.
ERROR = 1.15

Settings = Mapping[str, Any]
Phases = Callable[[Settings], dict[str, Bytes]]
"""From settings by key to what each phase of the run holds."""


@dataclass(frozen=True)
class Machine:
    """The devices of a run, as its settings name them; they need not be here if `memory_gb` says what each has."""

    device: str
    dtype: str
    attention: str
    gpus: int
    memory_gb: float | None

    @property
    def kind(self) -> str:
        """cuda or cpu. Raises DirlError for what is neither."""
        if self.device in ("cpu", "cuda"):
            return self.device
        return pick_device(self.device)

    def free_bytes(self) -> int:
        """Bytes that each process may take: `memory_gb`, or its share of what is free now.

        Raises DirlError where there is no such device here and `memory_gb` does not say.
        """
        if self.memory_gb is not None:
            return int(self.memory_gb * 1e9)
        if self.kind == "cpu":
            return int(psutil.virtual_memory().available) // self.gpus
        if not torch.cuda.is_available():
            raise DirlError("there is no CUDA device here to ask: say which it is to be, such as plan.device=h100")
        return torch.cuda.mem_get_info()[0]

    @property
    def owner(self) -> str:
        """Whose memory a process takes, such as `each GPU's`, as the words before an amount."""
        if self.kind == "cuda":
            owner = "each GPU's" if self.gpus > 1 else "the GPU's"
        else:
            owner = "each process's" if self.gpus > 1 else "the machine's"
        if self.memory_gb is None:
            owner += " free"
        return owner


@dataclass(frozen=True)
class Budget:
    """A run's memory against what there is.

    phases: from settings to the bytes of each phase, by part. settings: what the phases depend on, as configured.
    knobs: by key, what it may be instead, from the least change on; keys first whose change costs least.
    alternatives: where no knobs suffice, other ways to train the same model: each a list of changes, from the least
    on, of which the first that fits is proposed. facts: model and micro-batch, in words. duration: what the run
    computes. time: how long that takes on a GPU that is known. parameters: of the model; None for a fourth
    of the bytes that they take. learns: whether it is trained, and so is not started where it does not fit.
    """

    phases: Phases
    settings: Settings
    knobs: Mapping[str, Sequence[Any]]
    machine: Machine
    facts: str
    alternatives: Sequence[Sequence[Settings]] = ()
    duration: Duration | None = None
    time: TimePlan | None = None
    parameters: int | None = None
    learns: bool = True

    @cached_property
    def free_bytes(self) -> int:
        return self.machine.free_bytes()

    def need(self, changes: Settings) -> int:
        """Bytes of the phase that holds most, with some settings changed."""
        phases = self.phases({**self.settings, **changes})
        return max(sum(sizes.values()) for sizes in phases.values())

    def fits(self, changes: Settings) -> bool:
        return self.need(changes) <= SPARE * self.free_bytes

    def smallest_fitting_change(self, fixed: Settings | None = None) -> dict[str, Any] | None:
        """Changes that make it fit, none of which could be left out or be smaller; None if nothing does.

        fixed: changes to begin with, which stay.
        """
        fixed = dict(fixed or {})
        changes = dict(fixed)

        # Turn knobs until it fits, those first that cost least.
        for key, values in self.knobs.items():
            if key in fixed:
                continue
            for value in values:
                if not self.fits(changes):
                    changes[key] = value
        if not self.fits(changes):
            return None

        # Then take back what is not needed, the dearest first. Once is not enough: checkpointing of few layers takes
        # more than it saves, and when it is gone, more of the others may go.
        previous: dict[str, Any] = {}
        while changes != previous:
            previous = changes
            for key in reversed(previous):
                if key not in fixed:
                    changes = self._with_least(key, changes)
        return fixed | {key: changes[key] for key in self.knobs if key in changes}

    def _with_least(self, key: str, changes: dict[str, Any]) -> dict[str, Any]:
        """The same fitting changes with the smallest of `key` that still fits, or without it."""
        without = {name: value for name, value in changes.items() if name != key}
        if self.fits(without):
            return without
        for value in self.knobs[key]:
            if self.fits({**without, key: value}):
                return {**without, key: value}
        return changes

    def proposals(self) -> list[dict[str, Any]]:
        """The smallest change that fits; where none does, the first of each alternative that does."""
        if changes := self.smallest_fitting_change():
            return [changes]
        proposed = [self._first_that_fits(alternative) for alternative in self.alternatives]
        return [changes for changes in proposed if changes]

    def _first_that_fits(self, alternative: Sequence[Settings]) -> dict[str, Any] | None:
        for fixed in alternative:
            try:
                changes = self.smallest_fitting_change(fixed)
            except DirlError:
                continue  # an adapter to layers that this model does not have
            if changes:  # of which some may say only that a setting stays what it is
                return {key: value for key, value in changes.items() if self.settings.get(key) != value}
        return None

    def warnings(self) -> Iterator[str]:
        """What to say before the run starts: that it may not fit, or takes long. Raises DoesNotFit."""
        if doubt := self.require():
            yield doubt
        if self.duration and self.machine.kind == "cpu" and self.duration.is_long:
            yield self.duration.warning()

    def verdict(self) -> str:
        """Whether it fits, and else what does, in a sentence."""
        phases = self.phases(self.settings)
        totals = {phase: sum(sizes.values()) for phase, sizes in phases.items()}
        largest = max(totals, key=totals.__getitem__)
        need = totals[largest]
        free = f"{self.machine.owner} {format_bytes(self.free_bytes)}"
        takes = f"the {largest} takes about {format_bytes(need)} of {free}"
        if self.fits({}):
            return f"this fits: {takes}"

        may = "may" if need <= ERROR * self.free_bytes else "does"
        takes = f"this {may} not fit: {takes}"
        anyway = ""
        if self.learns:
            anyway = f" (memory_gb={math.ceil(need / SPARE / 1e9)} starts it all the same)"
        choices = []
        for changes in self.proposals():
            choices.append(f"{format_settings(changes)}, which takes {format_bytes(self.need(changes))}")
        if choices:
            return f"{takes}: give {'; or '.join(choices)}{anyway}"

        # Nothing helps: what the model itself takes grows with its parameters, and so tells how many would fit.
        least = self.need({key: values[-1] for key, values in self.knobs.items() if values})
        parameters = self.parameters or max(sizes["parameters"] for sizes in phases.values()) / 4
        millions = parameters / 1e6 * SPARE * self.free_bytes / least
        of_model = "parameters, gradients and optimizer states" if self.learns else "parameters"
        return (
            f"{takes}, and {format_bytes(least)} whatever the settings, with {of_model}: choose a model of at most"
            f" {millions:,.0f} million parameters{anyway}"
        )

    def require(self) -> str | None:
        """Raises DoesNotFit if it clearly does not; returns a sentence if it may not."""
        if self.need({}) > ERROR * self.free_bytes:
            raise DoesNotFit(self.verdict())
        if not self.fits({}):
            return self.verdict()
        return None

    def show(self, config: Any, console: Console) -> None:
        """Print the configuration, the memory that each part takes in each phase, their seconds, and the verdict.

        Raises DoesNotFit, whose sentence the verdict then is.
        """
        text = yaml.safe_dump(config, default_flow_style=None, sort_keys=False, allow_unicode=True, width=110)
        console.print(Syntax("", "yaml", theme="ansi_dark").highlight(text))
        console.print(self.table())
        console.print(f"\n{self.facts}", markup=False)
        if self.duration and self.machine.kind == "cpu":
            console.print(f"{self.duration}\n{self.duration.guess()}", markup=False)
        elif self.time:
            console.print()
            console.print(self.time.table())
            for line in ["", *self.time.lines()]:
                console.print(line, markup=False)
        else:
            console.print(no_time(self.machine.kind), markup=False)
        if config["price_per_gpu_hour"] is not None and not self.time:
            console.print("price_per_gpu_hour has no hours to multiply: give plan.device", markup=False)
        self.require()
        console.print(self.verdict(), style="bold", markup=False)

    def table(self) -> Table:
        """The memory as a row for each part and a column for each phase."""
        phases = self.phases(self.settings)
        table = Table("memory", box=None, padding=(0, 2, 0, 0))
        names: dict[str, None] = {}  # of parts, each once and in order
        for phase, sizes in phases.items():
            table.add_column(phase, justify="right")
            names |= dict.fromkeys(sizes)

        # A part that a run of this kind never has is no row of its table.
        for name in names:
            row = [sizes.get(name, 0) for sizes in phases.values()]
            if any(row):
                cells = [format_bytes(size) if size else "" for size in row]
                table.add_row(name, *cells)
        totals = [sum(sizes.values()) for sizes in phases.values()]
        table.add_row("together", *map(format_bytes, totals), style="bold")
        return table


def format_settings(changes: Settings) -> str:
    """Settings as words of a command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def halvings(value: int, least: int) -> list[int]:
    """The halves of a number: half of it, a quarter, and so on, not below `least`."""
    return [value >> i for i in range(1, value.bit_length()) if value >> i >= least]


def format_bytes(count: float) -> str:
    """Bytes as 65.5 GB or 71 MB."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB"
