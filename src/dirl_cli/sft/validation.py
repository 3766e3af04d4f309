"""What a model makes of held-out demonstrations, whose noise is always the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.masking import Band, Example
from dirl_cli.sft.batches import Noise
from dirl_cli.training.trainer import Loss, Trainer


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
        found = trainer.measure(trainer.cut(self.rows, micro_rows), loss, self.answer_tokens)
        accuracy = {
            metric(rate): trainer.measure(trainer.cut(rows, micro_rows), loss, len(rows.targets))["likeliest"]
            for rate, rows in self.by_rate.items()
        }
        return {"validation_loss": found["loss"], **accuracy}


def hold_out(examples: Sequence[Example], noise: Noise, rates: Sequence[float], seed: int) -> Validation:
    """Hide tokens of the examples, of which there is at least one, as `noise` does and at each of the rates."""
    rows, answer_tokens = noise.rows(examples, seed)
    by_rate = {rate: replace(noise, masking=Band(rate, rate)).rows(examples, seed)[0] for rate in rates}
    return Validation(rows, answer_tokens, by_rate)
