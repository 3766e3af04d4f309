"""Whether a run fits the memory there is, and if not, the nearest settings that do."""

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
from rich.table import Column, Table

from dirl_cli.errors import DirlError, DoesNotFit
from dirl_cli.models.load import pick_device
from dirl_cli.plan.duration import Duration
from dirl_cli.plan.memory import Bytes

SPARE = 0.95  # what fits leaves a twentieth free
ERROR = 1.15  # what is refused would not fit either if the estimate were so much too high

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
        return self.device if self.device in ("cpu", "cuda") else pick_device(self.device)

    def free_bytes(self) -> int:
        """Bytes that each process may take: `memory_gb`, or its share of what is free now."""
        if self.memory_gb is not None:
            return int(self.memory_gb * 1e9)
        if self.kind == "cpu":
            return int(psutil.virtual_memory().available) // self.gpus
        if not torch.cuda.is_available():
            raise DirlError("there is no CUDA device here to ask: say what each GPU has, such as memory_gb=80")
        return torch.cuda.mem_get_info()[0]

    @property
    def owner(self) -> str:
        """Whose memory a process takes, such as `each GPU's`."""
        if self.kind == "cuda":
            owner = "each GPU's" if self.gpus > 1 else "the GPU's"
        else:
            owner = "each process's" if self.gpus > 1 else "the machine's"
        return f"{owner} free" if self.memory_gb is None else owner


@dataclass(frozen=True)
class Budget:
    """A run's memory against what there is.

    settings: what the phases depend on, as configured. knobs: by key, what it may be instead, from the least change
    on; those first that cost least. ways: where no knobs suffice, other ways to train the same model: each a list of
    changes, from the least on, of which the first that fits is proposed. facts: what else is worth knowing.
    duration: what the run computes.
    """

    phases: Phases
    settings: Settings
    knobs: Mapping[str, Sequence[Any]]
    machine: Machine
    facts: str
    ways: Sequence[Sequence[Settings]] = ()
    duration: Duration | None = None

    @cached_property
    def free_bytes(self) -> int:
        return self.machine.free_bytes()

    def need(self, changes: Settings) -> int:
        """Bytes of the phase that holds most."""
        return max(sum(parts.values()) for parts in self.phases({**self.settings, **changes}).values())

    def fits(self, changes: Settings) -> bool:
        return self.need(changes) <= SPARE * self.free_bytes

    def smallest_fitting_change(self, way: Settings | None = None) -> dict[str, Any] | None:
        """Changes that make it fit, none of which could be left out or be smaller; None if nothing does.

        way: changes to begin with, which stay.
        """
        start = dict(way or {})
        changes = dict(start)
        for key, value in ((key, value) for key, values in self.knobs.items() for value in values):
            if self.fits(changes):
                break
            changes[key] = value
        if not self.fits(changes):
            return None
        previous: dict[str, Any] = {}
        while (
            changes != previous
        ):  # again, since checkpointing of few layers takes more than it saves: without it more fits
            previous = changes
            for key in [key for key in reversed(changes) if key not in start]:
                others = {other: value for other, value in changes.items() if other != key}
                least = next(value for value in self.knobs[key] if self.fits({**others, key: value}))
                changes = others if self.fits(others) else {**others, key: least}
        return start | {key: changes[key] for key in self.knobs if key in changes}

    def proposals(self) -> list[dict[str, Any]]:
        """The nearest settings that fit; where none do, the least of each other way to train the same model."""
        if changes := self.smallest_fitting_change():
            return [changes]
        found = [self.first_that_fits(ways) for ways in self.ways]
        return [changes for changes in found if changes]

    def first_that_fits(self, ways: Sequence[Settings]) -> dict[str, Any] | None:
        for way in ways:
            try:
                changes = self.smallest_fitting_change(way)
            except DirlError:
                continue  # an adapter to layers that this model does not have
            if changes:
                return changes
        return None

    def warnings(self) -> Iterator[str]:
        """What to say before the run starts: that it may not fit, or takes long. Raises DoesNotFit."""
        if doubt := self.require():
            yield doubt
        if self.duration and self.machine.kind == "cpu" and self.duration.is_long:
            yield self.duration.warning()

    def verdict(self) -> str:
        """Whether it fits, and else what does, in a sentence."""
        now, need = self.phases(self.settings), self.need({})
        phase = max(now, key=lambda name: sum(now[name].values()))
        takes = f"the {phase} takes about {format_bytes(need)} of {self.machine.owner} {format_bytes(self.free_bytes)}"
        if self.fits({}):
            return f"this fits: {takes}"
        takes = f"this {'may' if need <= ERROR * self.free_bytes else 'does'} not fit: {takes}"
        anyway = f"(memory_gb={math.ceil(need / SPARE / 1e9)} starts it all the same)"
        if proposals := self.proposals():
            choices = [
                f"{format_settings(changes)}, which takes {format_bytes(self.need(changes))}" for changes in proposals
            ]
            return f"{takes}: give {'; or '.join(choices)} {anyway}"
        least = self.need({key: values[-1] for key, values in self.knobs.items() if values})
        millions = max(parts["parameters"] for parts in now.values()) / 4e6 * SPARE * self.free_bytes / least
        return (
            f"{takes}, and {format_bytes(least)} whatever the settings, with parameters, gradients and optimizer"
            f" states: choose a model of at most {millions:,.0f} million parameters {anyway}"
        )

    def require(self) -> str | None:
        """Raises DoesNotFit if it clearly does not; returns a sentence if it may not."""
        if self.need({}) > ERROR * self.free_bytes:
            raise DoesNotFit(self.verdict())
        return None if self.fits({}) else self.verdict()

    def show(self, config: Any, console: Console) -> None:
        """Print the configuration, the memory that each part takes in each phase, and the verdict.

        Raises DoesNotFit, whose sentence the verdict then is.
        """
        text = yaml.safe_dump(config, default_flow_style=None, sort_keys=False, allow_unicode=True, width=110)
        console.print(Syntax("", "yaml", theme="ansi_dark").highlight(text))
        console.print(self.table())
        console.print(f"\n{self.facts}", markup=False)
        if self.duration and self.machine.kind == "cpu":
            console.print(str(self.duration), markup=False)
        self.require()
        console.print(self.verdict(), style="bold", markup=False)

    def table(self) -> Table:
        """A row for each part, a column for each phase."""
        phases = self.phases(self.settings)
        table = Table("memory", *(Column(phase, justify="right") for phase in phases), box=None, padding=(0, 2, 0, 0))
        for part in dict.fromkeys(part for parts in phases.values() for part in parts):
            sizes = [parts.get(part, 0) for parts in phases.values()]
            if any(sizes):
                table.add_row(part, *(format_bytes(one) if one else "" for one in sizes))
        table.add_row("together", *(format_bytes(sum(parts.values())) for parts in phases.values()), style="bold")
        return table


def format_settings(changes: Settings) -> str:
    """Settings as words of a command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def halvings(value: int, least: int) -> list[int]:
    """Half of it, a quarter, and so on, not below `least`."""
    return [value >> i for i in range(1, value.bit_length()) if value >> i >= least]


def format_bytes(count: float) -> str:
    """Bytes as 65.5 GB or 71 MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
