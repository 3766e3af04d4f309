"""What a model makes of held-out demonstrations, whose noise is always the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.masking import Band, Example
from dirl_cli.evaluation.held_out import HeldOutEval
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.peft import Peft
from dirl_cli.report.progress import StepProgress
from dirl_cli.reward.grading import Grader
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.sft.batches import Noise
from dirl_cli.training.sharded_model import model_to_sample
from dirl_cli.training.trainer import Loss, Sums, Trainer

STAGE_LOSS = "stage_loss"


def metric(rate: float) -> str:
    """The name of the denoising accuracy at a masking rate, such as denoising_accuracy/0.25."""
    return f"denoising_accuracy/{rate:g}"


@dataclass(frozen=True)
class Validation:
    """Held-out demonstrations under a run's own noise, and with a share of each answer hidden by that share."""

    rows: Rows
    answer_tokens: int
    by_rate: Mapping[float, Rows]

    def measure(self, trainer: Trainer, loss: Loss, micro_rows: int | None) -> dict[str, float]:
        """`validation_loss`, and at each rate the share of hidden tokens that are the likeliest there."""
        sums = trainer.measure(trainer.cut(self.rows, micro_rows), loss, self.answer_tokens)
        metrics = {"validation_loss": sums["loss"]}
        for rate, rows in self.by_rate.items():
            sums = trainer.measure(trainer.cut(rows, micro_rows), loss, len(rows.targets))
            metrics[metric(rate)] = sums["likeliest"]
        return metrics


@dataclass(frozen=True)
class FinetuneEvaluation:
    """What is measured while a model is fine-tuned, on demonstrations or on preferences.

    validation: what held-out rows give; None where there are none. shown: what they are called. dtype: of the weights
    that answer the held-out problems. answers_before: whether they do so before training, too, which says little of a
    model that cannot answer yet.
    """

    validation: Callable[[], dict[str, float]] | None
    shown: str
    held_out: HeldOutEval
    lm: DiffusionLM
    peft: Peft
    grader: Grader
    dtype: torch.dtype
    progress: StepProgress
    answers_before: bool = False

    def before_training(self) -> dict[str, float]:
        """What the held-out rows give, and the problems where they are answered before training."""
        return self.measure() if self.answers_before else self.validate()

    def validate(self) -> dict[str, float]:
        """What the held-out rows give. Raises Interrupted where it was stopped."""
        if not self.validation:
            return {}
        with self.progress.working(f"measuring {self.shown}"):
            return self.validation()

    def measure(self) -> dict[str, float]:
        """That, and how many of the held-out problems are answered right. Raises Interrupted where it was stopped."""
        metrics = self.validate()
        if self.held_out.problems:
            sampler = NativeSampler(model_to_sample(self.lm, self.peft, self.dtype))
            metrics |= self.held_out.run(sampler, self.grader)
        return metrics


@dataclass(frozen=True)
class StageValidation:
    """Held-out demonstrations of a run whose blocks grow, in the blocks of its end and in those of its stage.

    in_the_end: what they are there. noise: of the run's end. size: the block size of the stage.
    """

    in_the_end: Validation
    examples: Sequence[Example]
    noise: Noise
    seed: int
    size: Callable[[], int]

    def measure(self, trainer: Trainer, loss: Loss, micro_rows: int | None) -> dict[str, float]:
        """As of a `Validation`, and `stage_loss`, the same loss in smaller blocks as long as the run has those."""
        metrics = self.in_the_end.measure(trainer, loss, micro_rows)
        if self.size() != self.noise.block_size:
            in_stage = hold_out(self.examples, replace(self.noise, block_size=self.size()), (), self.seed)
            metrics[STAGE_LOSS] = in_stage.measure(trainer, loss, micro_rows)["validation_loss"]
        return metrics


def cross_entropy(rows: Rows, logprobs: Tensor, *_: Tensor) -> Sums:
    """The masked tokens' cross-entropy, weighted as the masking schedule asks. logprobs: (N,) of the scored tokens."""
    return {"loss": -(rows.weight * logprobs).sum()}


def hold_out(examples: Sequence[Example], noise: Noise, rates: Sequence[float], seed: int) -> Validation:
    """Hide tokens of the examples, of which there is at least one, as `noise` does and at each of the rates."""
    rows, answer_tokens = noise.rows(examples, seed)
    by_rate = {rate: replace(noise, masking=Band(rate, rate)).rows(examples, seed)[0] for rate in rates}
    return Validation(rows, answer_tokens, by_rate)
