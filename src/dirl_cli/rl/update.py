"""What is learned from a step's groups: packed rows, recorded log-probs and values, and the optimizer steps on them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from statistics import fmean

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.models.context import UNDIVIDED, ContextGroup
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.models.sharded_tensors import own_shard, unsharded
from dirl_cli.rl.advantages import AdvantageEstimator
from dirl_cli.rl.answer_strips import ALONE, Part
from dirl_cli.rl.batch import ObjectiveRows, TrajectoryGroup
from dirl_cli.rl.block_growth import NO_GROWTH, BlockGrowth
from dirl_cli.rl.corrections import Correction
from dirl_cli.rl.critic import Critic, StepAdvantages, require_whole_trace, value_metrics
from dirl_cli.rl.groups import Group
from dirl_cli.rl.objective import Objective, k3
from dirl_cli.rl.teacher import TeacherPrompt, of_the_same_tokens, token_keys
from dirl_cli.rl.units import at_level
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.sharded_model import share_root
from dirl_cli.training.trainer import MicroBatches, Trainer, of_each, own
from dirl_cli.types import Decoding

# Of `Objective.loss`, over tokens by weight.
TOKEN_SUMS = ("entropy", "ratio", "clipped", "kl", "correction", "correction_square", "correction_cut")


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step learns from.

    denominator: of the loss, see `Objective.denominator`. group_sizes: answers in each group, in order. num_tokens,
    num_scored: of all processes' rows, see `ObjectiveRows`.
    """

    micro_batches: MicroBatches
    denominator: float
    group_sizes: list[int]
    num_tokens: int
    num_scored: int


@dataclass(frozen=True)
class PolicyUpdate:
    """Takes the optimizer steps of a rollout.

    advantages: from the rewards of a step's groups. reference: a model to stay near.
    old_from_sampler: the ratio's denominator is the sampler's log-prob; else it is the trainer's at the first pass, and
    `correction` makes up for the difference. longest: answer tokens allowed. critic: learns the values of states, on
    the same rows. step_advantages: what it makes of them. teacher_prompt: what the reference reads where that is not
    what the policy reads. growth: of the blocks that answers are scored in.
    """

    trainer: Trainer
    objective: Objective
    advantages: AdvantageEstimator
    lm: DiffusionLM
    reference: LogprobModel | None
    old_from_sampler: bool
    correction: Correction
    mini_batches: int
    epochs: int
    train_tail: bool
    row_tokens: int
    micro_rows: int | None
    longest: int
    seed: int
    peft: Peft = FullFinetune()
    critic: Critic | None = None
    step_advantages: StepAdvantages = field(default_factory=StepAdvantages)
    teacher_prompt: TeacherPrompt | None = None
    growth: BlockGrowth = NO_GROWTH

    def run(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Learn from the groups of step `step` (from 0); returns the mean metrics of the optimizer steps, if any.

        Beside them `staleness_metrics`.
        """
        if self.objective.passes_over and not self.critic:
            groups = with_advantage(groups)
            if not groups:
                return {}

        version = self.trainer.steps_taken
        batches = []
        for i, mini_batch in enumerate(split_evenly(groups, self.mini_batches)):
            batches.append(self.make_minibatch(mini_batch, step, i))

        # Only at the first optimizer step is the policy still the sampler's, so only there can the two be compared.
        mismatch = Mismatch(self.objective, version)
        sums: list[dict[str, float]] = []  # of each optimizer step
        value_sums: list[dict[str, float]] = []
        for _ in range(self.epochs):
            for batch in batches:
                is_first = not sums
                loss = mismatch.loss if is_first and self.objective.is_exact else self.objective.loss
                micro_batches = batch.micro_batches
                if self.objective.self_normalised:
                    micro_batches = self.add_answer_weights(batch)
                sums.append(self.trainer.step(micro_batches, loss, batch.denominator))
                self.move_reference()
                if self.critic:
                    with self.trainer.times("critic"):
                        value_sums.append(self.critic.step(batch.micro_batches, batch.num_scored))

        metrics = self.take_mismatch(sums[0], mismatch)
        metrics |= mean_metrics(sums)
        if value_sums:
            metrics |= value_metrics(value_sums)
        if self.growth != NO_GROWTH:
            metrics["block_size"] = self.growth.at(self.lm, step).block_size
        metrics |= staleness_metrics(groups, version)
        metrics["token_forwards"] = sum(batch.num_tokens for batch in batches)
        return metrics

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps besides the policy, by the name of its file."""
        if self.reference is None or not self.objective.reference_every:
            return {}
        return {"reference": dict(self.reference.model.named_parameters())}

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
            process = [record.process for record in group]
            annotated.append(TrajectoryGroup([record.trajectory for record in group], advantages, process))
        rows = self.pack_groups(annotated, step, number)
        micro_batches = self.own_micro_batches(rows)

        # The ratio's denominator: what the sampler recorded, or what the trainer says before its first step.
        if self.old_from_sampler:
            micro_batches = of_each(micro_batches, with_old_from_sampler)
        elif (self.objective.needs_old_logprobs and self.mini_batches * self.epochs > 1) or self.correction.cap:
            micro_batches = self.trainer.add_scores(micro_batches, self.trainer.model, "old_logprobs")
        if self.correction.cap and not self.old_from_sampler:
            micro_batches = of_each(micro_batches, self.add_importance_weights)

        if self.reference is not None and self.teacher_prompt is not None:
            teacher_prompt = replace(self.teacher_prompt, block_size=self.growth.at(self.lm, step).block_size)
            told = teacher_prompt.put(annotated, [group[0].problem for group in groups])
            scored = self.own_micro_batches(self.pack_groups(told, step, number))
            micro_batches = self.add_teachers_logprobs(self.reference, scored, micro_batches)
        elif self.reference is not None:
            micro_batches = self.trainer.add_scores(micro_batches, self.reference, "ref_logprobs")
        micro_batches = self.add_step_advantages(micro_batches)
        denominator = self.objective.denominator(rows.lengths, self.longest)
        sizes = [len(group) for group in groups]
        return MiniBatch(micro_batches, denominator, sizes, rows.num_tokens, rows.num_scored)

    def pack_groups(self, groups: Sequence[TrajectoryGroup], step: int, number: int) -> ObjectiveRows:
        """How a mini-batch is packed in the objective's views. Every process has to call."""
        accelerator = self.trainer.accelerator
        part = ALONE
        if accelerator.num_processes > 1:
            part = Part(accelerator.process_index, accelerator.num_processes, gather_object)
        with self.trainer.times("rows"):
            return ObjectiveRows(
                groups,
                self.objective,
                BlockSpec(self.growth.at(self.lm, step).block_size, self.lm.mask_token_id),
                self.lm.pad_token_id,
                self.row_tokens,
                self.train_tail,
                generator(self.seed, step, number),
                part,
            )

    def own_micro_batches(self, rows: ObjectiveRows) -> MicroBatches:
        """The micro-batches of some rows, of which this process makes those that it computes."""
        with self.trainer.times("rows"):
            each = self.trainer.rows_each(len(rows.bins), self.micro_rows)
            starts = range(0, len(rows.bins), each)
            computed = {i for i, _ in self.trainer.turns(len(starts))}
            micro_batches: list[Rows | None] = []
            for i, start in enumerate(starts):
                micro_batches.append(rows.rows(rows.bins[start : start + each]) if i in computed else None)
            return micro_batches

    def add_step_advantages(self, micro_batches: MicroBatches) -> MicroBatches:
        """The micro-batches with an advantage for each token where steps differ: in value, reward or distance to it."""
        if self.critic:
            micro_batches = self.trainer.add_scores(micro_batches, self.critic.trainer.model, "values")
        elif any("process_reward" in rows.extras for rows in own(micro_batches)):
            require_whole_trace(self.objective, "a process reward")
        elif self.step_advantages.gamma == 1:
            return micro_batches
        return of_each(micro_batches, self.step_advantages)

    def add_importance_weights(self, rows: Rows) -> Rows:
        """The rows with the weights that make up for a sampler that was not the trainer; see corrections.py."""
        extras = rows.extras
        weights, is_cut = self.correction.weights(rows, extras["old_logprobs"], extras["sampler_logprobs"])
        return rows.with_extras(importance_weight=weights, is_cut=is_cut.float())

    def add_answer_weights(self, batch: MiniBatch) -> MicroBatches:
        """The micro-batches with each answer's weight in its group; see `self_normalised_weights`.

        One more pass, since an answer's weight depends on all answers of its group, wherever they are computed.
        """
        if not all("old_logprobs" in rows.extras for rows in own(batch.micro_batches)):
            return batch.micro_batches  # the policy is still the one that sampled
        micro_batches = self.trainer.add_scores(batch.micro_batches, self.trainer.model, "present_logprobs")
        own_log_ratios: dict[int, float] = {}  # by answer
        for rows in own(micro_batches):
            log_ratio = at_level("sequence", rows.extras["present_logprobs"] - rows.extras["old_logprobs"], rows)
            own_log_ratios |= dict(zip(rows.extras["sample"].tolist(), log_ratio.tolist(), strict=True))

        log_ratios = own_log_ratios
        if self.trainer.accelerator.num_processes > 1:
            log_ratios = dict(gather_object(list(own_log_ratios.items())))
        by_answer = torch.tensor([log_ratios.get(sample, 0.0) for sample in range(sum(batch.group_sizes))])
        weights = self_normalised_weights(by_answer, batch.group_sizes, 1 + self.objective.clip_high)
        return of_each(micro_batches, lambda rows: rows.with_extras(answer_weight=weights[rows.extras["sample"]]))

    def move_reference(self) -> None:
        """Move the reference towards the policy, every `reference_every` optimizer steps by `reference_rate`."""
        every = self.objective.reference_every
        if self.reference is None or not every or self.trainer.steps_taken % every:
            return
        move_towards(self.reference.model, unsharded(self.peft.pushed(self.lm)), self.objective.reference_rate)

    def add_teachers_logprobs(
        self, teacher: LogprobModel, scored: MicroBatches, micro_batches: MicroBatches
    ) -> MicroBatches:
        """The micro-batches with what the teacher says of their tokens, from the rows in which it sees them itself."""
        parts = []
        for rows in own(self.trainer.add_scores(scored, teacher, "ref_logprobs")):
            parts.append((token_keys(rows), rows.extras["ref_logprobs"]))
        if self.trainer.accelerator.num_processes > 1:
            parts = gather_object(parts)
        keys, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return of_each(
            micro_batches, lambda rows: rows.with_extras(ref_logprobs=of_the_same_tokens(keys, scores, rows))
        )


def with_old_from_sampler(rows: Rows) -> Rows:
    """The rows with the sampler's log-probs for those of the policy before the step."""
    return rows.with_extras(old_logprobs=rows.extras["sampler_logprobs"])


@torch.no_grad()
def move_towards(reference: nn.Module, weights: Iterable[tuple[str, Tensor]], rate: float) -> None:
    """Move each parameter of the reference so far towards the weight of its name.

    weights: of all parameters, under the names of a model without an adapter.
    """
    parameters = dict(reference.named_parameters())
    for name, weight in weights:
        target, own = own_shard(weight, parameters.pop(name))
        target.lerp_(own.to(target), rate)
    if parameters:  # a name that does not fit would leave a weight where it was, in silence
        raise KeyError(f"the policy has no {min(parameters)}")


def with_advantage(groups: Sequence[Group]) -> list[Group]:
    """The groups without answers that neither have an advantage nor steps with rewards, those with any left."""
    learned_from = []
    for group in groups:
        if kept := [record for record in group if record.advantage or record.process]:
            learned_from.append(kept)
    return learned_from


def staleness_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """How many optimizer steps ago what is learned from was sampled.

    version: of the policy. staleness: of an answer's tokens, the mean over answers. staleness_max: of the oldest block.
    spanning: the share of answers with blocks of several versions, where there are any.
    """
    answers = [record.trajectory for record in chain.from_iterable(groups)]
    metrics = {
        "staleness": version - fmean(fmean(answer.versions or [answer.weights_version]) for answer in answers),
        "staleness_max": float(version - min(answer.weights_version for answer in answers)),
    }
    if any(answer.versions for answer in answers):
        metrics["spanning"] = fmean(bool(answer.versions) for answer in answers)
    return metrics


def split_evenly(groups: Sequence[Group], mini_batches: int) -> list[Sequence[Group]]:
    """The groups in order, in as many mini-batches, or as many as there are groups; sizes differ by one at most."""
    count = min(mini_batches, len(groups))
    edges = [i * len(groups) // count for i in range(count + 1)]
    return [groups[start:end] for start, end in pairwise(edges)]


def mean_metrics(sums: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over optimizer steps; what is a sum over tokens is divided by their total weight first.

    correction_ess: the effective sample size (Σw)²/Σw² of importance weights, as a share of their number.
    """
    steps = []
    for step in sums:
        total_weight = step["total_weight"] or 1.0  # 0 where no token counts, such as of answers that are all overlong
        means = {name: step[name] / total_weight for name in TOKEN_SUMS if name in step}
        if "correction" in means:
            square = means.pop("correction_square")
            means["correction_ess"] = means["correction"] ** 2 / max(square, 1e-12)
        steps.append({name: value for name, value in step.items() if name not in ("total_weight", *TOKEN_SUMS)} | means)
    metrics = {name: fmean([step[name] for step in steps]) for name in steps[0]}
    metrics["skipped"] = sum(step["skipped"] for step in steps)
    return metrics


def reference_model(lm: DiffusionLM, decoding: Decoding, context: ContextGroup = UNDIVIDED) -> LogprobModel:
    """What gives the log-probs of a model to stay near, its tokens drawn as `decoding` says."""
    model = LogprobModel(lm.model, lm.unsampled_ids, decoding, context=context).to(lm.device)
    share_root(model)
    return model


@dataclass
class Mismatch:
    """An objective that also compares log-probs; largest: of the differences in nats, so far.

    version: of the weights; tokens sampled from others are left out.
    """

    objective: Objective
    version: int
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))

    def loss(self, rows: Rows, logprobs: Tensor, entropy: Tensor, *_: Tensor) -> dict[str, Tensor]:
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


def self_normalised_weights(log_ratios: Tensor, group_sizes: Sequence[int], cap: float) -> Tensor:
    """softmax over each group of min(log-ratio, log cap), times the group's size so that the mean is 1: (A,).

    log_ratios: (A,) of all answers, group by group. cap: of a ratio (StableDRL, arXiv 2603.06743).
    """
    weights = []
    for group in log_ratios.clamp(max=math.log(cap)).split(list(group_sizes)):
        weights.append(group.softmax(0) * len(group))
    return torch.cat(weights)
