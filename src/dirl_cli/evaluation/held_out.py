"""What a model is asked while it learns: problems, answered greedily."""

import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator

from dirl_cli.data.chat import answer_text
from dirl_cli.distributed import split_by_cost
from dirl_cli.errors import Interrupted
from dirl_cli.evaluation.run import graded
from dirl_cli.models.load import DiffusionLM
from dirl_cli.report.progress import StepProgress
from dirl_cli.reward.grading import Grader
from dirl_cli.reward.verifiers import gives_parts
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.types import Decoding, Problem


@dataclass(frozen=True)
class HeldOutEval:
    """Problems with their prompts, answered as `decoding` says, but greedily. Every process answers its share."""

    problems: Sequence[Problem]
    prompts: Sequence[list[int]]
    lm: DiffusionLM
    decoding: Decoding
    accelerator: Accelerator
    progress: StepProgress
    stoppable: Callable[[], AbstractContextManager[None]] = nullcontext  # surrounds what may be given up by raising

    def run(self, sampler: Sampler, grader: Grader) -> dict[str, float]:
        """`greedy_accuracy`: the share of the problems that are answered right; nothing without problems.

        And `greedy_credit`, their mean credit, where any of them can be right in part.

        Raises Interrupted, in every process, where one was asked to stop before all were answered.
        """
        if not self.problems:
            return {}

        tokenizer = self.lm.require_tokenizer()
        lengths = [len(prompt) for prompt in self.prompts]
        share = split_by_cost(lengths, self.accelerator.num_processes)[self.accelerator.process_index]
        problems = [self.problems[i] for i in share]
        prompts = [self.prompts[i] for i in share]

        # A stop ends the answering, but not yet the function: the other processes wait in the reduce below, and learn
        # from its sum that one of them has stopped.
        answered = right = 0
        credit = 0.0
        showing = self.progress.working("answering held-out problems", len(problems))
        with showing as done, suppress(Interrupted), self.stoppable(), self.accelerator.autocast():
            answers = sampler.stream(prompts, 1, replace(self.decoding, temperature=0.0))
            for answer in graded(answers, problems, partial(answer_text, tokenizer), grader):
                right += int(answer.correct)
                credit += answer.credit or 0.0
                answered += 1
                done(answered)

        counts = torch.tensor([float(answered), float(right), credit], device=self.accelerator.device)
        answered_everywhere, right_everywhere, credit_everywhere = self.accelerator.reduce(counts).tolist()
        if answered_everywhere < len(self.problems):
            raise Interrupted(signal.SIGTERM)  # or Ctrl-C: the run's StopSignal knows
        measured = {"greedy_accuracy": right_everywhere / len(self.problems)}
        if any(map(gives_parts, self.problems)):
            measured["greedy_credit"] = credit_everywhere / len(self.problems)
        return measured


@dataclass(frozen=True)
class SamplerEvaluation:
    """Held-out problems, answered by the sampler of a run. block_size: which they are answered in at the time."""

    held_out: HeldOutEval
    sampler: Sampler
    grader: Grader
    block_size: Callable[[], int]

    def before_training(self) -> dict[str, float]:
        return self.measure()

    def measure(self) -> dict[str, float]:
        """See `HeldOutEval.run`."""
        self.sampler.set_block_size(self.block_size())
        return self.held_out.run(self.sampler, self.grader)
