"""Display the progress of a run: a live line in a terminal, a plain line every so often elsewhere."""

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
    "stage_loss": "stage loss {:.4f}",
    "denoising_accuracy": "{1} hidden: {0:.0%} right",
    "reward_margin": "margin {:.3f}",
    "reward_accuracy": "{:.0%} told apart",
    "validation_reward_margin": "validation margin {:.3f}",
    "validation_reward_accuracy": "{:.1%} of held-out pairs told apart",
    "accuracy": "accuracy {:.0%}",
    "greedy_accuracy": "greedy accuracy {:.1%}",
    "greedy_credit": "greedy credit {:.1%}",
    "reward": "reward {:.3f}",
    "length": "{:.0f} tokens",
    "tokens_per_forward": "{:.2f} a forward",
    "kept": "{:.0%} kept",
    "skipped": "{:.0f} skipped",
}


class StepProgress:
    """Shows steps on standard output, outside a terminal every `every` of them; a quiet one shows nothing.

    steps: of the whole run. names: the metrics shown of each step.
    """

    def __init__(self, steps: int, every: int, names: Sequence[str], quiet: bool = False) -> None:
        self.steps = steps
        self.every = every
        self.names = names
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
        self.done = done
        self.started = time.perf_counter()
        self.task = self.bar.add_task("", total=self.steps, completed=done)
        with self.bar:
            yield

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step's metrics and the time that is left, at the pace since this process began."""
        seconds_per_step = (time.perf_counter() - self.started) / (step - self.done)
        remaining = format_clock(seconds_per_step * (self.steps - step))
        text = f"step {step}/{self.steps} · {remaining} left · {format_metrics(metrics, *self.names)}"
        if self.live:
            self.bar.update(self.task, completed=step, description=text)
        elif due(step, self.every) or step == self.steps:
            self.print_line(text)

    def note(self, step: int, metrics: Mapping[str, float], *names: str) -> None:
        """Print a line that stays, with the named metrics that a step has; nothing where it has none of them.

        step: 0 is before the first.
        """
        text = format_metrics(metrics, *names)
        if text and step:
            self.print_line(f"step {step}/{self.steps} · {text}")
        elif text:
            self.print_line(f"before · {text}")

    def sum_up(self, times: Mapping[str, float]) -> None:
        """Print where the time of the run went. times: seconds by phase."""
        if times:
            self.print_line(f"{format_clock(sum(times.values()))} went into {format_shares(times)}")

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
    texts = []
    for name in names:
        if name in metrics:
            family, _, member = name.partition("/")  # denoising_accuracy/0.5 is a member of a family
            texts.append(FORMS[family].format(metrics[name], member))
    return " · ".join(texts)


def format_clock(seconds: float) -> str:
    """Such as 1:05 or 2:01:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_shares(times: Mapping[str, float]) -> str:
    """Where the time went, such as: backpropagation 88% · optimizer 9% · rows 3%."""
    total = sum(times.values()) or 1.0
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return " · ".join(f"{phase} {seconds / total:.0%}" for phase, seconds in ordered)
