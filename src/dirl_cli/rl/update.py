"""What is learned from a step's groups: packed rows, recorded log-probs, and the optimizer steps on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor, nn

from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.rl.batch import Group, objective_rows
from dirl_cli.rl.objective import Objective, k3, ratio_of
from dirl_cli.rl.rollouts import Answers
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.parallel import reshard, unsharded
from dirl_cli.training.trainer import Trainer
from dirl_cli.types import Decoding

COMPARED = ("compared", "mismatch_mean", "mismatch_kl")  # sums that only a first optimizer step has


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step learns from."""

    micro_batches: list[Rows]
    norm: float


@dataclass(frozen=True)
class PolicyUpdate:
    """Takes the optimizer steps of a rollout.

    reference: a frozen model to stay near. old_from_sampler: the ratio's denominator is the sampler's log-prob; else
    it is the trainer's at the first pass, and `correction_cap` above 0 bounds the importance weights that make up for
    the difference. longest: answer tokens allowed.
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
    peft: Peft = FullFinetune()

    def run(self, groups: Sequence[Answers], step: int) -> dict[str, float]:
        """Learn from the groups of step `step` (from 0); returns the mean metrics of the optimizer steps.

        staleness: optimizer steps since the answers were sampled.
        """
        version = self.trainer.steps_taken
        n = min(self.mini_batches, len(groups))
        parts = [groups[i * len(groups) // n : (i + 1) * len(groups) // n] for i in range(n)]
        batches = [self.make_minibatch(part, step, i) for i, part in enumerate(parts)]

        # Only at the first optimizer step is the policy still the sampler's, so only there can the two be compared.
        mismatch = Mismatch(self.objective, version)
        taken: list[dict[str, float]] = []
        for _ in range(self.epochs):
            for batch in batches:
                compares = not taken and self.objective.is_exact
                loss = mismatch.loss if compares else self.objective.loss
                taken.append(self.trainer.step(batch.micro_batches, loss, batch.norm))

        compared, *differences = (taken[0].pop(name, 0.0) for name in COMPARED)
        for sums in taken:
            weight = sums.pop("weight")
            for name in ("entropy", "ratio", "clipped", "kl"):
                if name in sums:
                    sums[name] /= weight
        metrics = {name: fmean([sums[name] for sums in taken]) for name in taken[0]}
        metrics["skipped"] = sum(sums["skipped"] for sums in taken)
        if compared:
            metrics |= {name: value / compared for name, value in zip(COMPARED[1:], differences, strict=True)}
            metrics["mismatch_max"] = float(self.trainer.accelerator.gather(mismatch.largest[None]).max())
        metrics["staleness"] = version - fmean(one.trajectory.weights_version for group in groups for one in group)
        metrics["token_forwards"] = sum(rows.num_tokens for batch in batches for rows in batch.micro_batches)
        return metrics

    def publish(self, sampler: Sampler) -> None:
        """Give the sampler the policy's weights as they are now. Every process has to call."""
        sampler.update_weights(unsharded(self.peft.pushed(self.lm)), self.trainer.steps_taken)

    def make_minibatch(self, groups: Sequence[Answers], step: int, part: int) -> MiniBatch:
        """Rows in the objective's views with all that it asks of each token."""
        annotated = [Group([r.trajectory for r in group], [r.advantage or 0.0 for r in group]) for group in groups]
        with self.trainer.times("rows"):
            rows, lengths = objective_rows(
                annotated,
                self.objective,
                BlockSpec(self.lm.block_size, self.lm.mask_token_id),
                self.lm.pad_token_id,
                self.row_tokens,
                self.train_tail,
                generator(self.seed, step, part),
            )
            micro_batches = self.trainer.cut(rows, self.micro_rows)

        # The ratio's denominator: what the sampler recorded, or what the trainer says before its first step.
        if self.old_from_sampler:
            micro_batches = [with_extras(rows, old_logprobs=rows.extras["sampler_logprobs"]) for rows in micro_batches]
        elif self.mini_batches * self.epochs > 1 or self.correction_cap:
            micro_batches = self.add_logprobs(micro_batches, self.trainer.model, "old_logprobs")
        if self.correction_cap and not self.old_from_sampler:
            micro_batches = [self.add_importance_weights(rows) for rows in micro_batches]

        if self.reference is not None:
            micro_batches = self.add_logprobs(micro_batches, self.reference, "ref_logprobs")
        return MiniBatch(micro_batches, self.objective.norm(lengths, self.longest))

    def add_importance_weights(self, rows: Rows) -> Rows:
        """The rows with the weights that make up for a sampler that was not the trainer; see `corrections`."""
        if "old_logprobs" not in rows.extras:  # another process's share
            return rows
        return with_extras(
            rows,
            importance_weight=corrections(
                rows.extras["old_logprobs"], rows.extras["sampler_logprobs"], self.correction_cap
            ),
        )

    @torch.no_grad()
    def add_logprobs(self, micro_batches: Sequence[Rows], model: nn.Module, name: str) -> list[Rows]:
        """The micro-batches with a model's log-probs under `name`, by each process on its share of them."""
        accelerator = self.trainer.accelerator
        model.eval()
        with self.trainer.times("logprobs"):
            with accelerator.autocast():
                logprobs = {
                    id(rows): model(rows.to(accelerator.device))[0] for rows, _ in self.trainer.share(micro_batches)
                }
            reshard(model)
            return [
                with_extras(rows, **{name: logprobs[id(rows)].to(rows.target_index.device)})
                if id(rows) in logprobs
                else rows
                for rows in micro_batches
            ]


def reference_model(lm: DiffusionLM, decoding: Decoding) -> nn.Module:
    """What gives the log-probs of a frozen model to stay near, its tokens drawn as `decoding` says."""
    return LogprobModel(lm.model, lm.unsampled_ids, decoding).to(lm.device)


def with_extras(rows: Rows, **extras: Tensor) -> Rows:
    return replace(rows, extras={**rows.extras, **extras})


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
        fresh = ((rows.extras["version"] == self.version) & (rows.weight > 0)).float()
        difference = fresh * (logprobs.detach() - rows.extras["sampler_logprobs"])
        self.largest = torch.maximum(self.largest.to(difference.device), difference.abs().max())
        return {
            **self.objective.loss(rows, logprobs, entropy),
            "compared": fresh.sum(),
            "mismatch_mean": difference.abs().sum(),
            "mismatch_kl": k3(difference).sum(),
        }


def corrections(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(π_old / π_sampler, cap) (N,) for what an engine sampled a little differently."""
    return ratio_of(old_logprobs - sampler_logprobs).clamp(max=cap)
