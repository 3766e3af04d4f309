"""Blocks filling in the terminal: what a forward revealed is lit, what is hidden is shaded."""

import time

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dirl_cli.console import PlainConsole
from dirl_cli.models.load import DiffusionLM

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
