"""What a model is asked while it learns: problems, answered greedily."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator

from dirl_cli.data.chat import answer_text
from dirl_cli.evaluation.grade import graded
from dirl_cli.loop.share import balanced
from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.reward.grading import Grader
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.types import Decoding, Problem


@dataclass(frozen=True)
class Exam:
    """Problems with their prompts, answered as `decoding` says, but greedily. Every process answers its share."""

    problems: Sequence[Problem]
    prompts: Sequence[list[int]]
    lm: DiffusionLM
    decoding: Decoding
    accelerator: Accelerator

    def take(self, sampler: Sampler, grader: Grader) -> dict[str, float]:
        """`greedy_accuracy`: the share of the problems that are answered right; nothing without problems."""
        if not self.problems:
            return {}
        tokenizer = self.lm.require_tokenizer()
        shares = balanced([len(prompt) for prompt in self.prompts], self.accelerator.num_processes)
        share = shares[self.accelerator.process_index]
        own, prompts = [self.problems[i] for i in share], [self.prompts[i] for i in share]
        with self.accelerator.autocast():
            answers = sampler.stream(prompts, 1, replace(self.decoding, temperature=0.0))
            right = sum(answer.correct for answer in graded(answers, own, partial(answer_text, tokenizer), grader))
        right_everywhere = self.accelerator.reduce(torch.tensor(float(right), device=self.accelerator.device))
        return {"greedy_accuracy": float(right_everywhere) / len(self.problems)}
