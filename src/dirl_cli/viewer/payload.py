"""What the page is given: answers as plain containers, each text once, numbers in four digits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from dirl_cli.errors import DirlError
from dirl_cli.text import counted
from dirl_cli.types import Trajectory
from dirl_cli.viewer.answer_sources import AnswerSource, ShownAnswer

INCOMPLETE = "\ufffd"  # what a part of a letter's bytes is decoded to
KINDS = {
    "rollouts": "of a reinforcement run",
    "completions": "sampled by dirl generate",
    "evaluation": "of an evaluation",
}


@dataclass
class Table:
    """Values in the order in which they first came up, each once; `index` is where one stands."""

    places: dict[Any, int] = field(default_factory=dict)

    def index(self, value: Any) -> int:
        return self.places.setdefault(value, len(self.places))

    @property
    def values(self) -> list[Any]:
        return list(self.places)


@dataclass(frozen=True)
class TokenReader:
    """Reads tokens as text. tokenizer: None shows their numbers. block_size: of answers that do not tell theirs."""

    tokenizer: PreTrainedTokenizerBase | None
    block_size: int | None = None
    known: dict[int, str] = field(default_factory=dict)
    incomplete: set[int] = field(default_factory=set)  # of these, those that are a part of a letter

    def text(self, token_ids: Sequence[int]) -> str:
        """Tokens as one text, special ones included."""
        if self.tokenizer is None:
            return "".join(f"⟨{token}⟩" for token in token_ids)
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token. Of a letter that several tokens spell the first has all, the others nothing."""
        for token in set(token_ids) - self.known.keys():
            self.known[token] = self.text([token]) or f"⟨{token}⟩"
            if INCOMPLETE in self.known[token]:
                self.incomplete.add(token)
        texts = [self.known[token] for token in token_ids]
        if self.incomplete.isdisjoint(token_ids):
            return texts

        first = 0
        while first < len(texts):
            end = first
            while end < len(texts) and INCOMPLETE in texts[end]:
                end += 1
            if end > first:
                texts[first:end] = [self.text(token_ids[first:end]), *[""] * (end - first - 1)]
            first = end + 1
        return texts

    def block_size_of(self, trajectory: Trajectory) -> int:
        """Raises DirlError where neither the answer nor a model tells."""
        size = trajectory.block_size or self.block_size
        if size is None:
            raise DirlError("the answers do not say how long their blocks are: give the model with model=DIR")
        return size


def payload(sources: Sequence[AnswerSource], readers: Sequence[TokenReader], command: str) -> dict[str, Any]:
    """All that the page shows. readers: of the tokens of each source. command: that makes this page."""
    texts = Table()
    prompts = Table()
    problems = Table()
    groups = Table()
    answers = []
    for number, (source, reader) in enumerate(zip(sources, readers, strict=True)):
        for answer in source.answers:
            problem = answer.problem
            place = problems.index((problem.id, problem.system, problem.question, problem.answer))
            shown: dict[str, Any] = {
                "source": number,
                "problem": place,
                "group": groups.index((number, answer.step, place)),
                **answer_facts(answer),
            }
            if answer.trajectory is None:
                shown["text"] = answer.text
            else:
                shown |= trace(answer.trajectory, reader, texts)
                shown["prompt"] = prompts.index(reader.text(answer.trajectory.prompt_ids))
            answers.append(shown)

    names = ("id", "system", "question", "reference")
    return {
        "title": " · ".join(source.name for source in sources),
        "sources": [{"name": source.name, "kind": source.kind, "summary": summary(source)} for source in sources],
        "command": command,
        "texts": texts.values,
        "prompts": prompts.values,
        "problems": [dict(zip(names, values, strict=True)) for values in problems.values],
        "answers": answers,
    }


def answer_facts(answer: ShownAnswer) -> dict[str, Any]:
    """What is known of an answer besides its tokens; what nobody told is left out."""
    known = {
        "sample": answer.sample,
        "step": answer.step,
        "correct": answer.correct,
        "reward": rounded(answer.reward),
        "parts": {name: rounded(value) for name, value in answer.parts.items()} if len(answer.parts) > 1 else None,
        "advantage": rounded(answer.advantage),
        "learned_from": answer.learned_from,
        "stop": answer.stop_reason,
        "length": answer.length,
        "forwards": answer.forwards,
        "extracted": answer.extracted,
    }
    return {name: value for name, value in known.items() if value is not None}


def trace(trajectory: Trajectory, reader: TokenReader, texts: Table) -> dict[str, Any]:
    """An answer's tokens, as places in `texts`, and how each came about.

    order: the denoising forward of the answer that revealed a token. offset: tokens of the prompt in the first block.
    """
    block_size = reader.block_size_of(trajectory)
    entropies = {}
    if trajectory.entropies:
        entropies = {"entropies": [rounded(entropy) for entropy in trajectory.entropies]}
    return {
        "tokens": [texts.index(text) for text in reader.pieces(trajectory.token_ids)],
        "steps": trajectory.reveal_step,
        "order": trajectory.revealed_at(block_size),
        "logprobs": [rounded(logprob) for logprob in trajectory.logprobs],
        **entropies,
        "block_size": block_size,
        "offset": len(trajectory.prompt_ids) % block_size,
    }


def rounded(number: float | None) -> float | None:
    """A number in four digits."""
    return None if number is None else float(f"{number:.4g}")


def summary(source: AnswerSource) -> str:
    """Such as: 128 answers to 16 problems, of steps 1 to 120 of a reinforcement run."""
    problems = {(answer.problem.id, answer.problem.question) for answer in source.answers}
    sentence = f"{counted(len(source.answers), 'answer')} to {counted(len(problems), 'problem')}"
    steps = sorted({answer.step for answer in source.answers if answer.step is not None})
    if len(steps) > 1:
        sentence += f" in {len(steps)} steps ({steps[0]} to {steps[-1]})"
    elif steps:
        sentence += f" in step {steps[0]}"
    sentence += f" {KINDS[source.kind]}"
    if source.left_out:
        sentence += f"; {source.left_out:,} more are left out"
    return sentence
