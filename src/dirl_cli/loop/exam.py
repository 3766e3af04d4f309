"""What a model is asked while it learns: problems, answered greedily."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from dirl_cli.data.chat import encode_question
from dirl_cli.evaluation.grade import graded
from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.reward.grading import Grader
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.types import Decoding, Problem


@dataclass(frozen=True)
class Exam:
    """Problems and how they are answered: as `decoding` says, but greedily. Every process answers its share."""

    problems: Sequence[Problem]
    instruction: str | None
    decoding: Decoding
    accelerator: Accelerator

    def take(self, lm: DiffusionLM, sampler: Sampler, grader: Grader) -> dict[str, float]:
        """`greedy_accuracy`: the share of the problems that are answered right; nothing without problems."""
        if not self.problems:
            return {}
        tokenizer = lm.require_tokenizer()
        own = self.problems[self.accelerator.process_index :: self.accelerator.num_processes]
        prompts = [encode_question(tokenizer, problem.question, self.instruction) for problem in own]

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        with self.accelerator.autocast():
            answers = sampler.stream(prompts, 1, replace(self.decoding, temperature=0.0))
            right = sum(answer.correct for answer in graded(answers, own, decode, grader))
        right_everywhere = self.accelerator.reduce(torch.tensor(float(right), device=self.accelerator.device))
        return {"greedy_accuracy": float(right_everywhere) / len(self.problems)}
