"""Preference optimisation, from top to bottom: score pairs of answers, and prefer the chosen one more."""

import time

from torch import nn

from dirl_cli.dpo.batches import PairBatches
from dirl_cli.dpo.preference import Preference
from dirl_cli.sft.validation import FinetuneEvaluation
from dirl_cli.training.prefetch import Prefetched
from dirl_cli.training.session import Session


def train(
    run: Session,
    batches: PairBatches,
    reference: nn.Module,
    preference: Preference,
    evaluation: FinetuneEvaluation | None,
    micro_rows: int | None,
) -> None:
    """Take the steps that are left of a run. micro_rows: rows in a forward; None for all of a step."""
    prefetched = Prefetched(batches.__getitem__, run.steps)
    for step in run.remaining_steps(evaluation):
        began = time.perf_counter()

        # The step's pairs, both answers of each in one row (1, T), in the states in which they are scored.
        with run.timed("rows"):
            micro_batches = run.trainer.cut(prefetched[step], micro_rows)

        # The frozen reference scores the very same states, then one optimizer step on the mean over all pairs.
        with run.showing():
            scored = run.trainer.add_scores(micro_batches, reference, "ref_logprobs")
            metrics = run.trainer.step(scored, preference.loss, batches.batch_size)

        # Report, evaluate and save where it is due; stop where it was asked for.
        tokens = sum(rows.num_tokens for rows in micro_batches)
        metrics["tokens_per_s"] = tokens / (time.perf_counter() - began)
        metrics |= batches.epochs(step + 1)
        run.end_of_step(metrics)
