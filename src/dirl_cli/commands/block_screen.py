"""Blocks filling in the terminal: what a forward revealed is lit, what is hidden is shaded."""

import time
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dirl_cli.console import PlainConsole
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Trajectory

HIDDEN = "░"
PANELS = 6  # answers watched at a time


class Screen:
    """Several answers side by side, each in a panel."""

    def __init__(self, console: PlainConsole, lm: DiffusionLM, pace: float) -> None:
        self.tokenizer = lm.require_tokenizer()
        self.mask_token_id = lm.mask_token_id
        self.pace = pace  # seconds
        self.live = Live(console=console, refresh_per_second=30)
        self.answers: dict[tuple[int, int], list[int]] = {}  # token ids by (prompt, sample), as of the last forward
        self.previous: dict[tuple[int, int], list[int]] = {}  # and as of the one before

    def show(self, prompt: int, sample: int, token_ids: list[int]) -> None:
        """Draw an answer so far; waits `pace` seconds so that the eye can follow."""
        self.previous[prompt, sample] = self.answers.get((prompt, sample), [])
        self.answers[prompt, sample] = token_ids
        watched = list(self.answers)[:PANELS]
        pictures = [Panel(self.picture(key), title=f"{key[0]}.{key[1]}") for key in watched]
        self.live.update(Group(*pictures), refresh=True)
        # All that are watched move on in one forward, so that one pause does for them.
        if (prompt, sample) == watched[-1]:
            time.sleep(self.pace)

    def finish(self, prompt: int, sample: int) -> None:
        """Take a finished answer off the screen."""
        self.answers.pop((prompt, sample), None)
        self.live.update(Group())

    def picture(self, key: tuple[int, int]) -> Text:
        """An answer's tokens: masked ones shaded, those of the last forward lit."""
        return draw_tokens(self.tokenizer, self.mask_token_id, self.answers[key], self.previous[key])


class AnswerScreen:
    """One answer as it is written, without a frame; drawn in a terminal alone, and taken off the screen at its end.

    stop_token_ids: what follows the first of them is not shown. pace: seconds to look at each forward in a terminal.
    """

    def __init__(self, console: PlainConsole, lm: DiffusionLM, stop_token_ids: tuple[int, ...], pace: float) -> None:
        self.console = console
        self.tokenizer = lm.require_tokenizer()
        self.mask_token_id = lm.mask_token_id
        self.stop_token_ids = stop_token_ids
        self.pace = pace
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.token_ids: list[int] = []  # as of the last forward
        self.forwards = 0
        self.seconds = 0.0  # that drawing took

    def __enter__(self) -> "AnswerScreen":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def show(self, prompt: int, sample: int, token_ids: list[int]) -> None:
        """Draw the answer as a forward leaves it. prompt, sample: which answer it is, of which there is one."""
        before = self.token_ids
        self.token_ids = token_ids
        self.forwards += 1
        if not self.live:
            return
        began = time.perf_counter()
        self.live.update(self.picture(before), refresh=True)
        time.sleep(self.pace)
        self.seconds += time.perf_counter() - began

    def picture(self, before: list[int]) -> Text:
        """As many of its last lines as the terminal has room for. before: its tokens as of the forward before."""
        shown = self.token_ids
        for i, token in enumerate(shown):
            if token in self.stop_token_ids:
                shown = shown[:i]
                break
        text = draw_tokens(self.tokenizer, self.mask_token_id, shown, before)
        lines = text.wrap(self.console, self.console.width)
        return Text("\n").join(lines[-max(1, self.console.height - 2) :])

    def answer_so_far(self, prompt_ids: list[int]) -> Trajectory:
        """What is written of the answer up to the first token that is still masked. prompt_ids: what it answers."""
        end = len(self.token_ids)
        if self.mask_token_id in self.token_ids:
            end = self.token_ids.index(self.mask_token_id)
        return Trajectory(
            prompt_ids, self.token_ids[:end], [], forwards=self.forwards, stop_token_ids=self.stop_token_ids
        )


def draw_tokens(
    tokenizer: PreTrainedTokenizerBase, mask_token_id: int, token_ids: list[int], before: list[int]
) -> Text:
    """Tokens as text: masked ones shaded, those of the last forward lit. before: the tokens as of the one before it."""
    text = Text()
    for i, token in enumerate(token_ids):
        if token == mask_token_id:
            text.append(HIDDEN * 2, style="dim")
        else:
            is_new = i >= len(before) or before[i] == mask_token_id
            style = "bold green" if is_new else ""
            text.append(str(tokenizer.decode([token])), style=style)
    return text
