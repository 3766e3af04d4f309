"""A teacher that reads another prompt than the policy, such as one that holds the answer.

It scores the policy's own answers in the very states that the policy's tokens are scored in, behind its own prompt
(on-policy self-distillation, arXiv 2601.18734). Where its prompt is longer, the answer moves to later positions. Blocks
begin at multiples of their size, so that the prompt may have to begin inside a block for the answer's to stay the same.

Shapes: N scored tokens of all micro-batches.
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


def of_the_same_tokens(scores: Tensor, scored: Sequence[Rows], micro_batches: Sequence[Rows]) -> list[Tensor]:
    """Scores of the tokens of some micro-batches, brought into the order of others that score the same: (N,) in all.

    scores: (N,), of the tokens of `scored`.
    """
    by_rank = torch.empty_like(scores)
    by_rank[token_ranks(scored)] = scores
    lengths = [len(rows.targets) for rows in micro_batches]
    return list(by_rank[token_ranks(micro_batches)].split(lengths))


def token_ranks(micro_batches: Sequence[Rows]) -> Tensor:
    """Which of all scored tokens each is, counted by answer, state and position, wherever it is packed: (N,)."""
    keys = []
    for rows in micro_batches:
        keys.append(torch.stack([rows.extras["sample"], rows.at_targets(rows.view), rows.at_targets(rows.position)]))
    return torch.cat(keys, 1).unique(dim=1, return_inverse=True)[1]
