"""A teacher that reads another prompt than the policy, such as one that holds the answer.

It scores the policy's own answers in the very states that the policy's tokens are scored in, behind its own prompt
(on-policy self-distillation, arXiv 2601.18734). Where its prompt is longer, the answer moves to later positions. Blocks
begin at multiples of their size, so that the prompt may have to begin inside a block for the answer's to stay the same.

Shapes: N scored tokens of a micro-batch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dirl_cli.data.chat import encode_questions
from dirl_cli.diffusion.layout import Rows
from dirl_cli.errors import DirlError
from dirl_cli.rl.batch import TrajectoryGroup
from dirl_cli.types import Instruction, Problem

VIEWS, PLACES = 2**16, 2**28  # more than an answer has; and of answers 2**19


@dataclass(frozen=True)
class TeacherPrompt:
    """Puts problems to the teacher.

    template: what stands in the question's place, with `{question}` and `{answer}` for those of the problem.
    positions: the most that the teacher was made for.
    """

    template: str
    tokenizer: PreTrainedTokenizerBase
    instruction: Instruction
    block_size: int
    positions: int

    def encode(self, problems: Sequence[Problem]) -> list[list[int]]:
        """The teacher's prompt of each problem, as token ids."""
        told = [replace(problem, question=self.filled_in(problem)) for problem in problems]
        return encode_questions(self.tokenizer, told, self.instruction)

    def filled_in(self, problem: Problem) -> str:
        """The template with the question and the answer of a problem, in which braces mean nothing."""
        texts = {"{question}": problem.question, "{answer}": problem.answer}
        pieces = re.split(r"(\{question\}|\{answer\})", self.template)
        return "".join(texts.get(piece, piece) for piece in pieces)

    def filler(self, prompt: Sequence[int], length: int) -> int:
        """Positions before the teacher's prompt, so that it ends as far inside a block as one of `length` tokens."""
        return (length - len(prompt)) % self.block_size

    def put(self, groups: Sequence[TrajectoryGroup], problems: Sequence[Problem]) -> list[TrajectoryGroup]:
        """The same answers behind the teacher's prompts. problems: of each group."""
        moved = []
        for group, problem, prompt in zip(groups, problems, self.encode(problems), strict=True):
            filler = self.filler(prompt, len(group.trajectories[0].prompt_ids))
            longest = max(len(trajectory.token_ids) for trajectory in group.trajectories)
            self.require_room(problem, filler + len(prompt) + longest)
            prompt_ids = [0] * filler + prompt
            trajectories = [replace(trajectory, prompt_ids=prompt_ids) for trajectory in group.trajectories]
            moved.append(replace(group, trajectories=trajectories, filler=filler))
        return moved

    def require_room(self, problem: Problem, positions: int) -> None:
        """Raises DirlError where the teacher's prompt and an answer take more positions than it has."""
        if positions > self.positions:
            raise DirlError(
                f"with algo.teacher_prompt, problem {problem.id} and its answer take {positions:,} positions, and the"
                f" teacher has {self.positions:,}: shorten it, or lower rl.max_prompt_tokens or decoding.max_new_tokens"
            )


def of_the_same_tokens(keys: Tensor, scores: Tensor, rows: Rows) -> Tensor:
    """The scores of the scored tokens of `rows`, (N,), among those of all tokens. keys, scores: of these, (T,) each.

    Raises KeyError where a token is not among them.
    """
    keys, order = keys.sort()
    own_keys = token_keys(rows)
    place = torch.searchsorted(keys, own_keys).clamp(max=len(keys) - 1)
    if not torch.equal(keys[place], own_keys):
        raise KeyError("the teacher scores other tokens than the policy")
    return scores[order[place]]


def token_keys(rows: Rows) -> Tensor:
    """A number for each scored token, the same wherever it is packed: of its answer, state and place there: (N,)."""
    return (rows.extras["sample"] * VIEWS + rows.at_targets(rows.view)) * PLACES + rows.extras["index"]
