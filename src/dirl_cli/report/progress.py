"""What a run shows while it goes: a live line in a terminal, a plain line every so often elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from rich.progress import BarColumn, Progress, TextColumn

from dirl_cli.console import PlainConsole, working

FORMS = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad {:.2f}",
    "lr": "lr {:.2e}",
    "adamw_lr": "adamw_lr {:.2e}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "validation_loss": "validation loss {:.4f}",
    "denoising_accuracy": "{1} hidden: {0:.0%} right",
    "accuracy": "accuracy {:.0%}",
    "greedy_accuracy": "greedy accuracy {:.1%}",
    "reward": "reward {:.3f}",
    "length": "{:.0f} tokens",
    "tokens_per_forward": "{:.2f} a forward",
    "kept": "{:.0%} kept",
    "skipped": "{:.0f} skipped",
}


class StepProgress:
    """Shows steps on standard output, outside a terminal every `every` of them; a quiet one shows nothing.

    shown: the metrics told of each step, by name.
    """

    def __init__(self, steps: int, every: int, shown: Sequence[str], quiet: bool = False) -> None:
        self.steps, self.every, self.shown = steps, every, shown
        self.console = PlainConsole(file=sys.stdout, quiet=quiet, soft_wrap=True)
        self.live = self.console.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            console=self.console,
            disable=not self.live,
        )

    @contextmanager
    def after(self, done: int) -> Iterator[None]:
        """Show the steps that follow those `done`."""
        self.done, self.started = done, time.perf_counter()
        self.task = self.bar.add_task("", total=self.steps, completed=done)
        with self.bar:
            yield

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell how a step went."""
        left = (time.perf_counter() - self.started) / (step - self.done) * (self.steps - step)
        text = f"step {step}/{self.steps} · {format_duration(left)} left · {format_metrics(metrics, *self.shown)}"
        if self.live:
            self.bar.update(self.task, completed=step, description=text)
        elif due(step, self.every) or step == self.steps:
            self.print_line(text)

    def note(self, step: int, metrics: Mapping[str, float], *names: str) -> None:
        """Print a line that stays with those of the named metrics that a step has; none where it has none."""
        if found := format_metrics(metrics, *names):
            self.print_line(f"step {step}/{self.steps} · {found}" if step else f"before · {found}")

    def sum_up(self, times: Mapping[str, float]) -> None:
        """Print where the time of the run went."""
        if times:
            self.print_line(f"{format_duration(sum(times.values()))} went into {format_shares(times)}")

    def working(self, what: str, total: int = 0) -> AbstractContextManager[Callable[..., None]]:
        """Show that something that may take long goes on; what it yields is told how many of `total` are done."""
        return working(self.console, what, total)

    def print_line(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text)

    def warn(self, text: str) -> None:
        """Print a line that stays and is seen."""
        self.console.print(text, style="bold yellow")


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps is to be done now; 0 is never."""
    return every > 0 and step % every == 0


def format_metrics(metrics: Mapping[str, float], *names: str) -> str:
    """Such as: loss 0.1234 · lr 1.00e-05."""
    known = [(metrics[name], name.partition("/")) for name in names if name in metrics]
    return " · ".join(FORMS[family].format(value, member) for value, (family, _, member) in known)


def format_duration(seconds: float) -> str:
    """Such as 1:05 or 2:01:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_shares(times: Mapping[str, float]) -> str:
    """Where the time went, such as: backpropagation 88% · optimizer 9% · rows 3%."""
    total = sum(times.values()) or 1.0
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return " · ".join(f"{phase} {seconds / total:.0%}" for phase, seconds in ordered)
