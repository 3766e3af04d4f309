"""What is learned from a step's groups: packed rows, recorded log-probs, and the optimizer steps on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor, nn

from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import Tokens
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rl.batch import Group, objective_rows
from dirl_cli.rl.objective import Objective, k3, ratio_of
from dirl_cli.rl.rollouts import Answers
from dirl_cli.training.parallel import release
from dirl_cli.training.trainer import Trainer

COMPARED = ("compared", "mismatch_mean", "mismatch_kl")  # sums that only a first optimizer step has


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step learns from."""

    micro_batches: list[Rows]
    norm: float


@dataclass(frozen=True)
class Learner:
    """Takes the optimizer steps of a rollout.

    reference: a frozen scorer to stay near. old_from_sampler: the ratio's denominator is the sampler's log-prob; else
    it is the trainer's at the first pass, and `correction_cap` above 0 bounds the weights that make up for the
    difference. longest: answer tokens allowed.
    """

    trainer: Trainer
    objective: Objective
    lm: DiffusionLM
    reference: nn.Module | None
    old_from_sampler: bool
    correction_cap: float
    mini_batches: int
    epochs: int
    train_tail: bool
    row_tokens: int
    micro_rows: int | None
    longest: int
    seed: int

    def learn(self, groups: Sequence[Answers], step: int) -> dict[str, float]:
        """Learn from the groups; returns the mean metrics of the optimizer steps.

        staleness: optimizer steps since the answers were sampled.
        """
        version = self.trainer.steps_taken
        n = min(self.mini_batches, len(groups))
        parts = [groups[i * len(groups) // n : (i + 1) * len(groups) // n] for i in range(n)]
        batches = [self.prepare(part, step, i) for i, part in enumerate(parts)]
        watch = Mismatch(self.objective, version)
        taken: list[dict[str, float]] = []
        for _ in range(self.epochs):
            for batch in batches:
                loss = self.objective.loss if taken or not self.objective.is_exact else watch.loss
                taken.append(self.trainer.step(batch.micro_batches, loss, batch.norm))
        compared, *differences = (taken[0].pop(name, 0.0) for name in COMPARED)
        for one in taken:
            weight = one.pop("weight")
            one |= {name: one[name] / weight for name in ("entropy", "ratio", "clipped", "kl") if name in one}
        metrics = {name: fmean([one[name] for one in taken]) for name in taken[0]}
        metrics["skipped"] = sum(one["skipped"] for one in taken)
        if compared:
            metrics |= {name: value / compared for name, value in zip(COMPARED[1:], differences, strict=True)}
            metrics["mismatch_max"] = float(self.trainer.accelerator.gather(watch.largest[None]).max())
        metrics["staleness"] = version - fmean(one.trajectory.weights_version for group in groups for one in group)
        metrics["token_forwards"] = sum(rows.num_tokens for batch in batches for rows in batch.micro_batches)
        return metrics

    def prepare(self, groups: Sequence[Answers], step: int, part: int) -> MiniBatch:
        """Rows in the objective's views with all that it asks of each token."""
        scored = [Group([r.trajectory for r in group], [r.advantage or 0.0 for r in group]) for group in groups]
        with self.trainer.times("rows"):
            rows, lengths = objective_rows(
                scored,
                self.objective,
                Tokens(self.lm.block_size, self.lm.mask_token_id),
                self.lm.pad_token_id,
                self.row_tokens,
                self.train_tail,
                generator(self.seed, step, part),
            )
            micro_batches = self.trainer.cut(rows, self.micro_rows)
        if self.old_from_sampler:
            micro_batches = [noted(rows, old=rows.notes["behaviour"]) for rows in micro_batches]
        elif self.mini_batches * self.epochs > 1 or self.correction_cap:
            micro_batches = self.scored(micro_batches, self.trainer.scorer, "old")
        if self.correction_cap and not self.old_from_sampler:
            micro_batches = [
                noted(rows, correction=corrections(rows.notes["old"], rows.notes["behaviour"], self.correction_cap))
                if "old" in rows.notes
                else rows
                for rows in micro_batches
            ]
        if self.reference is not None:
            micro_batches = self.scored(micro_batches, self.reference, "reference")
        return MiniBatch(micro_batches, self.objective.norm(lengths, self.longest))

    @torch.no_grad()
    def scored(self, micro_batches: Sequence[Rows], scorer: nn.Module, name: str) -> list[Rows]:
        """The micro-batches with a scorer's log-probs noted under `name`, by each process on its share of them."""
        accelerator = self.trainer.accelerator
        scorer.eval()
        with self.trainer.times("logprobs"):
            with accelerator.autocast():
                logprobs = {
                    id(rows): scorer(rows.to(accelerator.device))[0] for rows, _ in self.trainer.share(micro_batches)
                }
            release(scorer)
            return [
                noted(rows, **{name: logprobs[id(rows)].to(rows.where.device)}) if id(rows) in logprobs else rows
                for rows in micro_batches
            ]


def noted(rows: Rows, **notes: torch.Tensor) -> Rows:
    return replace(rows, notes={**rows.notes, **notes})


@dataclass
class Mismatch:
    """An objective that also compares log-probs; largest: of the differences in nats, so far.

    version: of the weights; tokens sampled from others are left out.
    """

    objective: Objective
    version: int
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))

    def loss(self, rows: Rows, logprobs: Tensor, entropy: Tensor) -> dict[str, Tensor]:
        """The objective's sums, and of the tokens compared: their number, |difference| and KL(sampler ‖ trainer)."""
        fresh = ((rows.notes["version"] == self.version) & (rows.weight > 0)).float()
        difference = fresh * (logprobs.detach() - rows.notes["behaviour"])
        self.largest = torch.maximum(self.largest.to(difference.device), difference.abs().max())
        return {
            **self.objective.loss(rows, logprobs, entropy),
            "compared": fresh.sum(),
            "mismatch_mean": difference.abs().sum(),
            "mismatch_kl": k3(difference).sum(),
        }


def corrections(old: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(π_old / π_sampler, cap) (N,) for what an engine sampled a little differently."""
    return ratio_of(old - behaviour).clamp(max=cap)
