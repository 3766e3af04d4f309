"""`dirl chat`: a conversation in the terminal, or of the lines that come through a pipe."""

import sys
import time
from contextlib import AbstractContextManager
from io import TextIOWrapper

from omegaconf import DictConfig

from dirl_cli.cli.build import build
from dirl_cli.commands.block_screen import AnswerScreen
from dirl_cli.commands.dialogue import Dialogue, Entry, read_entry
from dirl_cli.commands.generate import UNTRAINED, format_summary
from dirl_cli.commands.loaded_model import load_for_answers
from dirl_cli.commands.serve import require_own_block_size
from dirl_cli.console import PlainConsole, working
from dirl_cli.data.chat import answer_text, encode_messages
from dirl_cli.diffusion.unmasking import find_strategy
from dirl_cli.errors import DirlError, Interrupted, Stopped, stop_code
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.engines import Engine, Native, require_strategy
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.types import Decoding, Trajectory


def run(cfg: DictConfig, out: None) -> None:
    """Answer what is typed until Ctrl-D: answers go to standard output, what is said about them to standard error."""
    console = PlainConsole(soft_wrap=True)
    notes = PlainConsole(soft_wrap=True, stderr=True)
    engine: Engine = build(cfg.rollout)
    decoding = build(cfg.decoding, Decoding)

    def require_known(decoding: Decoding) -> None:
        require_strategy(engine, decoding)
        find_strategy(decoding.strategy)

    def require(decoding: Decoding) -> None:
        require_known(decoding)
        require_own_block_size(decoding, lm)

    require_known(decoding)  # before the model is loaded, which takes longer
    engine.require()
    if isinstance(build(cfg.model), Tiny):
        notes.print(UNTRAINED)
    lm = load_for_answers(cfg, cfg.device, notes)
    require(decoding)
    encode_messages(lm.require_tokenizer(), [{"role": "user", "content": "?"}])  # raises without a chat template

    dialogue = Dialogue(decoding, require)
    answerer = Answerer(lm, engine.start(lm), console, notes, cfg.pace, is_watched=isinstance(engine, Native))
    if is_typed():
        import readline  # noqa: F401  # with which `input` then edits lines

        notes.print("/help shows what can be typed, Ctrl-D ends", style="dim")
    elif isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    while entry := next_entry(notes):
        try:
            consequence = dialogue.receive(entry)
            if consequence.note:
                notes.print(consequence.note, style="dim")
            if consequence.asks:
                answerer.answer(dialogue)
        except DirlError as error:
            notes.print(str(error))
            continue
        except Interrupted as interrupt:
            raise stopped(interrupt) from None
        if consequence.ends:
            return


def is_typed() -> bool:
    """Whether somebody sits at a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def next_entry(notes: PlainConsole) -> Entry | None:
    """What is typed next; None at the end. Raises Stopped on SIGTERM, and on Ctrl-C where nobody types."""
    while True:
        try:
            return read_entry(typed_line)
        except EOFError:
            if is_typed():
                notes.print()
            return None
        except UnicodeDecodeError as error:
            raise DirlError(f"standard input is not UTF-8 text (byte {error.start}): convert it first") from error
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Interrupted) or not is_typed():
                raise stopped(interrupt) from None
            notes.print("\nCtrl-D or /quit ends the chat", style="dim")


def typed_line(prompt: str) -> str:
    """A line of standard input. prompt: shown to somebody who types. Raises EOFError at the end."""
    return input(prompt if is_typed() else "")


def stopped(interrupt: KeyboardInterrupt) -> Stopped:
    """The error of a chat that a signal ends."""
    return Stopped("stopped: what /save wrote is kept", stop_code(interrupt))


class Answerer:
    """Samples answers and shows them. is_watched: whether the engine tells of a block while it fills."""

    def __init__(
        self,
        lm: DiffusionLM,
        sampler: Sampler,
        console: PlainConsole,
        notes: PlainConsole,
        pace: float,
        is_watched: bool,
    ) -> None:
        self.lm = lm
        self.tokenizer = lm.require_tokenizer()
        self.sampler = sampler
        self.console = console
        self.notes = notes
        self.pace = pace
        self.is_watched = is_watched

    def answer(self, dialogue: Dialogue) -> None:
        """Answer the dialogue's last question, which is taken back where that fails. Raises DirlError then."""
        try:
            prompt_ids = encode_messages(self.tokenizer, dialogue.messages)
            if len(prompt_ids) > self.lm.longest_prompt:
                lengths = f"{len(prompt_ids)} tokens and the model has room for {self.lm.longest_prompt}"
                raise DirlError(f"the conversation would have {lengths}: shorten it, or /clear it")
            answer, seconds, ending = self._sample(prompt_ids, self.lm.decoding(dialogue.decoding))
        except DirlError:
            dialogue.take_back()
            raise
        if not answer.completion_ids and ending == "Ctrl-C":
            dialogue.take_back()
            self.notes.print("stopped before there was an answer, so the question is taken back", style="dim")
            return

        text = answer_text(self.tokenizer, answer.completion_ids)
        dialogue.answered(text)
        self.console.print(text)
        tokens = len(answer.token_ids)
        summary = format_summary(tokens, answer.forwards, ending)
        self.notes.print(f"{summary}, {tokens / seconds:,.0f} tokens/s", style="dim")

    def _sample(self, prompt_ids: list[int], decoding: Decoding) -> tuple[Trajectory, float, str]:
        """An answer, the seconds that it took but for drawing it, and what ended it. Ctrl-C leaves what was there."""
        screen = AnswerScreen(self.console, self.lm, decoding.stop_token_ids, self.pace)
        shown: AbstractContextManager = screen if self.is_watched else working(self.notes, "answering")
        began = time.perf_counter()
        stream = self.sampler.stream([prompt_ids], 1, decoding, watch=screen.show if self.is_watched else None)
        try:
            with shown:
                [(_, _, answer)] = list(stream)
            ending: str = answer.stop_reason
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Interrupted):  # which asks to end altogether
                raise
            answer = screen.answer_so_far(prompt_ids)
            ending = "Ctrl-C"
        return answer, time.perf_counter() - began - screen.seconds, ending
