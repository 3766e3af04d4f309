"""The text of an answer as its blocks come: cut at stop strings, and handed out as far as no later token changes it."""

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dirl_cli.data.chat import answer_text, first_stop

WINDOW = 64  # tokens that are decoded anew with each block
UNFINISHED = "\ufffd"  # stands for the bytes of a letter whose other bytes are in a later token


class GrowingText:
    """The text of one answer. finish_reason: why it ended; None while it goes on.

    token_ids: those of the text, without a stop token. max_tokens: of them at most. stops: texts before which it ends.
    is_shown: whether it is read while it grows, and not at its end alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        stops: Sequence[str],
        max_tokens: int,
        is_shown: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_token_ids = set(stop_token_ids)
        self.stops = stops
        self.max_tokens = max_tokens
        self.is_shown = is_shown
        self.token_ids: list[int] = []
        self.text = ""
        self.settled_text = ""  # of the first `settled` tokens, which are decoded no more
        self.settled = 0
        self.sent = 0  # characters of it that were handed out
        self.finish_reason: Literal["stop", "length"] | None = None

    def grow(self, token_ids: Sequence[int], is_last: bool) -> str:
        """Add the tokens of a block; returns what is new of the text and certain. is_last: no other block follows."""
        for token in token_ids:
            if self.finish_reason:
                break
            if token in self.stop_token_ids:
                self.finish_reason = "stop"
            else:
                self.token_ids.append(token)
                if len(self.token_ids) == self.max_tokens:
                    self.finish_reason = "length"

        # Nothing is decoded where nobody looks.
        if not (self.is_shown or self.stops or self.finish_reason or is_last):
            return ""
        self.text = self._decode()
        cut = first_stop(self.text[self.sent :], self.stops)  # none begins in what was handed out
        if cut is not None:
            self.text = self.text[: self.sent + cut]
            self.finish_reason = "stop"
        elif is_last and self.finish_reason is None:
            self.finish_reason = "length"  # of the room that there was

        certain = len(self.text)
        if self.finish_reason is None:
            certain -= self._uncertain()
        new = self.text[self.sent : certain]
        self.sent = max(self.sent, certain)
        return new

    def _decode(self) -> str:
        """The text of all tokens. Those before the last ones settle where the text may be cut without changing it."""
        unsettled = self.token_ids[self.settled :]
        text = answer_text(self.tokenizer, unsettled)
        if len(unsettled) > 2 * WINDOW:
            earlier = answer_text(self.tokenizer, unsettled[:-WINDOW])
            if earlier + answer_text(self.tokenizer, unsettled[-WINDOW:]) == text:  # no letter lies across
                self.settled += len(unsettled) - WINDOW
                self.settled_text += earlier
                text = text[len(earlier) :]
        return self.settled_text + text

    def _uncertain(self) -> int:
        """The characters at the end that a later token may change.

        That is half a letter, and before it the beginning of a stop string, which that letter may go on.
        """
        letters = self.text.rstrip(UNFINISHED)
        longest = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(letters)), longest, -1):
                if letters.endswith(stop[:length]):
                    longest = length
                    break
        return longest + len(self.text) - len(letters)
