"""What a training run learns from: demonstrations and problems as tokens, without those that do not fit."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from dirl_cli.data.chat import encode_questions, turn_end
from dirl_cli.data.columns import summarize_notes
from dirl_cli.data.conversation import says_something
from dirl_cli.data.rows import Row
from dirl_cli.data.tokens import PairTable, TokenTable, tokens_file, write_tokens
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.report.progress import StepProgress
from dirl_cli.types import Instruction, Problem

LARGE_SHARE = 0.1  # of the rows: a warning says so where more are left out


@dataclass(frozen=True)
class Questions:
    """Problems and their prompts as token ids, in the same order."""

    problems: list[Problem]
    prompts: list[list[int]]

    @property
    def digest(self) -> str:
        """A SHA-256 that changes with any of the prompts and answers, how these are verified, and their order."""
        answers: list[Any] = []
        for problem in self.problems:
            answer: Any = problem.answer
            if problem.verifier != "math" or problem.details:  # mathematics has the digest that it always had
                answer = [problem.answer, problem.verifier, problem.details]
            answers.append(answer)
        return hashlib.sha256(json.dumps([self.prompts, answers]).encode()).hexdigest()


@dataclass(frozen=True)
class Reader:
    """Turns rows into tokens for a model, and says of each kind how many there are and how many are left out, and why.

    max_tokens: of a demonstration. max_prompt_tokens: of a problem; None for as many as there is room for.
    """

    lm: DiffusionLM
    instruction: Instruction
    accelerator: Accelerator
    progress: StepProgress
    max_tokens: int = 0
    max_prompt_tokens: int | None = None

    def demonstrations(self, kind: str, rows: Sequence[Row]) -> TokenTable:
        """The rows as tokens, from the disk if an earlier start has met the same rows, template and tokenizer."""
        answered = [row for row in rows if has_answer(row.fields)]
        tokens, remark = self._tokens(kind, answered)
        if not rows:
            return tokens

        # What does not fit is left out rather than cut: half an answer would be learned as a whole one.
        longest = min(self.max_tokens, self.lm.max_length)
        fitting = tokens.at_most(longest)
        limit = f"max_tokens={longest}" if longest == self.max_tokens else f"the model's {longest} positions"
        left_out = {"answer nothing": len(rows) - len(answered), f"are longer than {limit}": len(tokens) - len(fitting)}
        summary = f"{len(fitting):,} {kind}, {fitting.lengths.sum():,} tokens{remark}"
        longest_row = int(max(tokens.lengths, default=0))
        self._say(summary, len(rows), left_out, longest_row, summarize_notes(rows))
        return fitting

    def pairs(self, kind: str, pairs: Sequence[tuple[Row, Row]]) -> PairTable:
        """The chosen and the rejected demonstrations as tokens, likewise from the disk if they are there."""
        answered = [pair for pair in pairs if all(has_last_answer(row.fields) for row in pair)]
        differing = [(chosen, rejected) for chosen, rejected in answered if chosen.fields != rejected.fields]
        tokens, remark = self._tokens(kind, list(chain.from_iterable(differing)))
        table = PairTable.of_alternating(tokens)
        if not pairs:
            return table

        longest = min(self.max_tokens, self.lm.max_length)
        fitting = table.at_most(longest)
        limit = f"max_tokens={longest}" if longest == self.max_tokens else f"the model's {longest} positions"
        left_out = {
            "have an empty answer": len(pairs) - len(answered),
            "prefer an answer to itself": len(answered) - len(differing),
            f"hold more than {limit}": len(table.chosen) - len(fitting.chosen),
        }
        total = fitting.chosen.lengths.sum() + fitting.rejected.lengths.sum()
        summary = f"{len(fitting.chosen):,} {kind}, {total:,} tokens{remark}"
        longest_row = int(max(tokens.lengths, default=0))
        self._say(summary, len(pairs), left_out, longest_row, summarize_notes(chosen for chosen, _ in pairs))
        return fitting

    def _tokens(self, kind: str, rows: Sequence[Row]) -> tuple[TokenTable, str]:
        """The rows as tokens, and a remark where an earlier start left them on the disk."""
        if not rows:
            return TokenTable.of([]), ""
        tokenizer = self.lm.require_tokenizer()
        self._warn_of_unknown_turn_end(tokenizer)

        # One process tokenises, and the others read what it wrote.
        file = tokens_file(tokenizer, rows, self.instruction)
        remark = ", tokenised before" if file.exists() else ""
        with self.accelerator.main_process_first(), self.progress.working(f"tokenising {len(rows):,} {kind}"):
            if not file.exists():
                write_tokens(file, tokenizer, rows, self.instruction)
        return TokenTable.read(file), remark

    def problems(self, kind: str, problems: Sequence[Problem], remarks: Sequence[str] = ()) -> Questions:
        """The problems with their prompts. remarks: what else there is to say of where they come from."""
        # Nothing can be rewarded against an answer that is not there.
        answered = [problem for problem in problems if problem.is_gradable]
        with self.progress.working(f"tokenising {len(answered):,} {kind}"):
            prompts = encode_questions(self.lm.require_tokenizer(), answered, self.instruction)

        # A prompt has to leave room for an answer among the model's positions.
        capacity = self.lm.longest_prompt
        longest = min(self.max_prompt_tokens or capacity, capacity)
        limit = f"rl.max_prompt_tokens={longest}"
        if longest == capacity:
            limit = f"the {capacity} tokens there is room for"
        fitting = Questions([], [])
        for problem, prompt in zip(answered, prompts, strict=True):
            if len(prompt) <= longest:
                fitting.problems.append(problem)
                fitting.prompts.append(prompt)

        left_out = {
            "have no answer": len(problems) - len(answered),
            f"have prompts longer than {limit}": len(answered) - len(fitting.problems),
        }
        if problems:
            longest_prompt = max(map(len, prompts), default=0)
            self._say(f"{len(fitting.problems):,} {kind}", len(problems), left_out, longest_prompt, remarks)
        return fitting

    def _warn_of_unknown_turn_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Warn where sampling would not stop at the token that answers are learned to end in."""
        end = turn_end(tokenizer)
        if end not in self.lm.stop_token_ids:
            self.progress.warn(
                f"warning: answers are learned to end in {tokenizer.convert_ids_to_tokens(end)}, at which sampling does"
                f" not stop: add {end} to eos_token_id in the model's generation_config.json"
            )

    def _say(self, summary: str, count: int, left_out: Mapping[str, int], longest: int, remarks: Sequence[str]) -> None:
        """Print a summary of `count` rows and how many were left out of them; a warning where those are many.

        left_out: how many, by the reason, in words. longest: tokens of the longest row, 0 where that is not known.
        """
        reasons = [f"{n:,} left out that {why}" for why, n in left_out.items() if n]
        self.progress.print_line("; ".join([summary, *reasons]))

        share = sum(left_out.values()) / count
        if share > LARGE_SHARE:
            warning = f"warning: {share:.0%} of {count:,} rows are not learned from"
            if longest:
                warning += f"; the longest has {longest:,} tokens"
            self.progress.warn(warning)
        for remark in remarks:
            self.progress.print_line(f"  {remark}")


class Digested(Protocol):
    """Rows to learn from, with a text that changes with any of them."""

    @property
    def digest(self) -> str: ...


def fingerprint_of(sources: Sequence[Digested]) -> str:
    """A SHA-256 that changes with anything that a run learns from."""
    digests = "".join(source.digest for source in sources)
    return hashlib.sha256(digests.encode()).hexdigest()


def require_same_data(name: str, began_with: str, now: str) -> None:
    """Raises DirlError where an unfinished run would go on with other data than it began with."""
    if now != began_with:
        raise DirlError(
            f"the rows of {name} are not those that this run began with: put them back, give this run another name=,"
            " or begin anew with resume=never"
        )


def has_answer(row: dict) -> bool:
    """Whether there is an answer in a demonstration."""
    if "messages" not in row:
        return bool(row.get("response", "").strip())
    return any(turn["role"] == "assistant" and says_something(turn) for turn in row["messages"])


def has_last_answer(row: dict) -> bool:
    """Whether there is an answer in the last turn of a demonstration, of which alone a pair learns."""
    if "messages" in row:
        return says_something(row["messages"][-1])
    return has_answer(row)
