"""What a training run learns from: demonstrations and problems as tokens, without those that do not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from dirl_cli.data.chat import encode_questions
from dirl_cli.data.tokens import Tokens, tokens_file, write_tokens
from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.training.order import Order
from dirl_cli.training.progress import StepProgress
from dirl_cli.types import Instruction, Problem


@dataclass(frozen=True)
class Questions:
    problems: list[Problem]
    prompts: list[list[int]]


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

    def demonstrations(self, kind: str, rows: Sequence[dict]) -> Tokens:
        """The rows as tokens, from the disk if an earlier start has met the same rows, template and tokenizer."""
        if not rows:
            return Tokens.of([])
        tokenizer = self.lm.require_tokenizer()
        answered = [row for row in rows if says_something(row)]
        file = tokens_file(tokenizer, answered, self.instruction)
        before = ", tokenised before" if file.exists() else ""
        status = self.progress.console.status(f"tokenising {len(answered):,} {kind}")
        with self.accelerator.main_process_first(), status:
            if not file.exists():
                write_tokens(file, tokenizer, answered, self.instruction)
        tokens = Tokens.read(file)
        longest = min(self.max_tokens, self.lm.max_length)
        fitting = tokens.at_most(longest)
        limit = f"max_tokens={longest}" if longest == self.max_tokens else f"the model's {longest} positions"
        left_out = {"answer nothing": len(rows) - len(answered), f"are longer than {limit}": len(tokens) - len(fitting)}
        self._say(f"{len(fitting):,} {kind}, {fitting.lengths.sum():,} tokens{before}", left_out)
        return fitting

    def problems(self, kind: str, problems: Sequence[Problem]) -> Questions:
        """The problems with their prompts."""
        answered = [problem for problem in problems if problem.answer.strip()]
        prompts = encode_questions(self.lm.require_tokenizer(), answered, self.instruction)
        room = self.lm.longest_prompt
        longest = min(self.max_prompt_tokens or room, room)
        limit = f"rl.max_prompt_tokens={longest}" if longest < room else f"the {room} tokens there is room for"
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest]
        left_out = {
            "have no answer": len(problems) - len(answered),
            f"have prompts longer than {limit}": len(answered) - len(fitting),
        }
        if problems:
            self._say(f"{len(fitting):,} {kind}", left_out)
        return Questions([answered[i] for i in fitting], [prompts[i] for i in fitting])

    def _say(self, found: str, left_out: Mapping[str, int]) -> None:
        self.progress.say("; ".join([found, *(f"{n:,} left out that {why}" for why, n in left_out.items() if n)]))


def says_something(row: dict) -> bool:
    """Whether there is an answer in a demonstration."""
    said = [message["content"] for message in row.get("messages", ()) if message["role"] == "assistant"]
    return any(words.strip() for words in said or [row.get("response", "")])


def epochs(order: Order, names: Sequence[str], place: int) -> dict[str, float]:
    """How often each source has been gone through before a place, as metrics."""
    parts = [f"epoch/{name}" for name in names] if len(names) > 1 else ["epoch"]
    return dict(zip(parts, order.epochs(place), strict=True))
