"""Fine-tuning, from top to bottom: hide answer tokens of demonstrations, and learn to fill them in."""

import time

from dirl_cli.diffusion.layout import Rows
from dirl_cli.sft.annealing import Annealing
from dirl_cli.sft.batches import NoisedBatches
from dirl_cli.sft.certainty import finetuning_loss
from dirl_cli.training.prefetch import Prefetched
from dirl_cli.training.session import Evaluation, Session


def train(
    run: Session,
    batches: NoisedBatches,
    annealing: Annealing,
    certainty: float,
    evaluation: Evaluation | None,
    micro_rows: int | None,
    prefetch: bool,
) -> None:
    """Take the steps that are left of a run.

    certainty: see sft/certainty.py. micro_rows: rows in a forward; None for all of a step. prefetch: make a step's rows
    while the step before is learned from, which has to leave them what they are.
    """

    def rows_of(step: int) -> tuple[Rows, int, list[Rows]]:
        # The step's demonstrations, freshly masked and packed into rows (1, T). Annealing may add them once more as a
        # causal model learns them.
        masked_rows, answer_tokens = batches[step]
        causal_rows = annealing.causal_rows(batches.demonstrations(step), batches.noise(step))
        return masked_rows, answer_tokens, causal_rows

    prefetched = Prefetched(rows_of, run.steps, prefetch)
    for step in run.remaining_steps(evaluation):
        began = time.perf_counter()

        with run.timed("rows"):
            masked_rows, answer_tokens, causal_rows = prefetched[step]
            micro_batches = []
            for rows in (masked_rows, *causal_rows):
                micro_batches += run.trainer.cut(rows, micro_rows)

        # One optimizer step on the sum over all hidden tokens, divided by the answer tokens of the whole batch.
        loss = finetuning_loss(certainty, answer_tokens, hidden=len(masked_rows.targets))
        with run.showing():
            metrics = run.trainer.step(micro_batches, loss, answer_tokens)

        # Report, evaluate and save where it is due; stop where it was asked for.
        tokens = sum(rows.num_tokens for rows in micro_batches)
        metrics["tokens_per_s"] = tokens / (time.perf_counter() - began)
        metrics |= batches.epochs(step + 1)
        run.end_of_step(metrics)
