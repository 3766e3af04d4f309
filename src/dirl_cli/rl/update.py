"""What is learned from a step's groups: packed rows, recorded log-probs, and the optimizer steps on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from statistics import fmean

import torch
from torch import Tensor, nn

from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.rl.batch import TrajectoryGroup, objective_rows
from dirl_cli.rl.objective import Objective, k3, ratio_of
from dirl_cli.rl.rollouts import Group
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.parallel import reshard, unsharded
from dirl_cli.training.trainer import Trainer
from dirl_cli.types import Decoding

TOKEN_SUMS = ("entropy", "ratio", "clipped", "kl")  # of `Objective.loss`, over tokens by weight


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step learns from."""

    micro_batches: list[Rows]
    denominator: float  # of the loss: see `Objective.denominator`

    @property
    def num_tokens(self) -> int:
        return sum(rows.num_tokens for rows in self.micro_batches)


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

    def run(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Learn from the groups of step `step` (from 0); returns the mean metrics of the optimizer steps.

        staleness: optimizer steps since the answers were sampled.
        """
        version = self.trainer.steps_taken
        batches = []
        for i, mini_batch in enumerate(split_evenly(groups, self.mini_batches)):
            batches.append(self.make_minibatch(mini_batch, step, i))

        # Only at the first optimizer step is the policy still the sampler's, so only there can the two be compared.
        mismatch = Mismatch(self.objective, version)
        sums: list[dict[str, float]] = []  # of each optimizer step
        for _ in range(self.epochs):
            for batch in batches:
                is_first = not sums
                loss = mismatch.loss if is_first and self.objective.is_exact else self.objective.loss
                sums.append(self.trainer.step(batch.micro_batches, loss, batch.denominator))

        metrics = self.take_mismatch(sums[0], mismatch)
        metrics |= mean_metrics(sums)
        versions = [record.trajectory.weights_version for record in chain.from_iterable(groups)]
        metrics["staleness"] = version - fmean(versions)
        metrics["token_forwards"] = sum(batch.num_tokens for batch in batches)
        return metrics

    def take_mismatch(self, sums: dict[str, float], mismatch: "Mismatch") -> dict[str, float]:
        """How far the sampler was from the trainer at the first optimizer step, whose sums lose what they had of it."""
        compared = sums.pop("compared", 0.0)  # tokens
        mean, kl = sums.pop("mismatch_mean", 0.0), sums.pop("mismatch_kl", 0.0)
        if not compared:
            return {}
        largest = self.trainer.accelerator.gather(mismatch.largest[None]).max()
        return {"mismatch_mean": mean / compared, "mismatch_kl": kl / compared, "mismatch_max": float(largest)}

    def publish(self, sampler: Sampler) -> None:
        """Give the sampler the policy's weights as they are now. Every process has to call."""
        sampler.update_weights(unsharded(self.peft.pushed(self.lm)), self.trainer.steps_taken)

    def make_minibatch(self, groups: Sequence[Group], step: int, number: int) -> MiniBatch:
        """Rows in the objective's views with all that it asks of each token."""
        annotated = []
        for group in groups:
            advantages = [record.advantage or 0.0 for record in group]
            annotated.append(TrajectoryGroup([record.trajectory for record in group], advantages))
        with self.trainer.times("rows"):
            rows, lengths = objective_rows(
                annotated,
                self.objective,
                BlockSpec(self.lm.block_size, self.lm.mask_token_id),
                self.lm.pad_token_id,
                self.row_tokens,
                self.train_tail,
                generator(self.seed, step, number),
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
        return MiniBatch(micro_batches, self.objective.denominator(lengths, self.longest))

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
            logprobs = {}
            with accelerator.autocast():
                for rows, _ in self.trainer.share(micro_batches):
                    logprobs[id(rows)] = model(rows.to(accelerator.device))[0]
            reshard(model)

            annotated = []
            for rows in micro_batches:
                if id(rows) in logprobs:
                    rows = with_extras(rows, **{name: logprobs[id(rows)].to(rows.target_index.device)})
                annotated.append(rows)
        return annotated


def split_evenly(groups: Sequence[Group], mini_batches: int) -> list[Sequence[Group]]:
    """The groups in order, in as many mini-batches, or as many as there are groups; sizes differ by one at most."""
    count = min(mini_batches, len(groups))
    edges = [i * len(groups) // count for i in range(count + 1)]
    return [groups[start:end] for start, end in pairwise(edges)]


def mean_metrics(sums: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over optimizer steps; what is a sum over tokens is divided by their total weight first."""
    steps = []
    for step in sums:
        total_weight = step["total_weight"]
        token_means = {name: step[name] / total_weight for name in TOKEN_SUMS if name in step}
        steps.append({name: value for name, value in step.items() if name != "total_weight"} | token_means)
    metrics = {name: fmean([step[name] for step in steps]) for name in steps[0]}
    metrics["skipped"] = sum(step["skipped"] for step in steps)
    return metrics


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
