"""One optimizer step, the same for every objective and any number of processes."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dirl_cli.diffusion.layout import Rows
from dirl_cli.errors import DirlError
from dirl_cli.models.context import UNDIVIDED, ContextGroup
from dirl_cli.models.sharded_tensors import full_tensor
from dirl_cli.training.parallel import prepare, reshard


class PhaseTimes:
    """Seconds spent in named phases: `total` since the start, and what `take` gives since it was last called.

    A run takes them with each line of its metrics, which so holds what came since the line before it.
    """

    def __init__(self) -> None:
        self.total: dict[str, float] = defaultdict(float)
        self._new: dict[str, float] = defaultdict(float)
        self._clocks: dict[str, tuple[Callable[[], float], float]] = {}  # and what each showed when last looked at

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.total[phase] += seconds
            self._new[phase] += seconds

    def watch(self, name: str, clock: Callable[[], float]) -> None:
        """Take what goes on inside of phases, too, by a clock of its seconds so far; it is in no total of its own."""
        self._clocks[name] = (clock, clock())

    def take(self) -> dict[str, float]:
        """The seconds since the last call, as metrics such as `seconds/optimizer`."""
        metrics = {f"seconds/{phase}": seconds for phase, seconds in self._new.items()}
        self._new = defaultdict(float)
        for name, (clock, earlier) in self._clocks.items():
            now = clock()
            if now > earlier:
                metrics[f"seconds/{name}"] = now - earlier
            self._clocks[name] = (clock, now)
        return metrics


Sums = dict[str, Tensor]
MicroBatches = Sequence[Rows | None]
"""Those of all processes in one order, and None for one that only others compute."""
Loss = Callable[..., Sums]
"""From rows and their N scored tokens' log-probs, entropies and is_likeliest, (N,) each, to `loss` and any metrics.

Each is a sum. Where the model gives another score, from that alone.
"""


class Trainer:
    """Takes optimizer steps on packed rows.

    The parameters stay in float32 and bf16 is autocast around the forward (the accelerator's `mixed_precision`),
    so that small updates are not rounded away, sharded or not.

    model: gives a micro-batch's scores, such as LogprobModel. schedule: the factor on every learning rate at a step.
    clip_norm: the gradient is scaled down to this norm. max_skipped, skip_norm: see `step`. stoppable: surrounds what
    may be given up by raising. rate: the key of the learning rate, for the sentence where steps cannot be taken.
    context: the processes among which the model divides rows, which compute the same micro-batches.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedule: Callable[[int], float],
        clip_norm: float,
        max_skipped: int = 0,
        skip_norm: float = math.inf,
        stoppable: Callable[[], AbstractContextManager[None]] = nullcontext,
        rate: str = "optim.lr",
        context: ContextGroup = UNDIVIDED,
    ) -> None:
        self.accelerator = accelerator
        self.model, self.optimizers = prepare(accelerator, model, optimizers)
        self.schedule = schedule
        self.clip_norm = clip_norm
        # The schedule multiplies these: an optimizer's own rates are overwritten at every step.
        self.full_rates: list[list[float]] = []  # of each optimizer's parameter groups
        for optimizer in self.optimizers:
            self.full_rates.append([group["lr"] for group in optimizer.param_groups])
        self.rate_names = ["lr"]
        for optimizer in optimizers[1:]:
            self.rate_names.append(f"{type(optimizer).__name__.lower()}_lr")
        self.max_skipped = max_skipped
        self.skip_norm = skip_norm
        self.stoppable = stoppable
        self.rate = rate
        self.context = context
        self.groups = accelerator.num_processes // context.size  # that compute micro-batches of their own
        self.skipped = 0  # updates in a row
        self.steps_taken = 0
        self.updates_applied = 0  # that moved the parameters: not skipped, and neither gradient nor rate is 0
        self.times = PhaseTimes()

    def step(self, micro_batches: MicroBatches, loss: Loss, normalizer: float) -> dict[str, float]:
        """Descend on Σ loss ÷ `normalizer`; returns that, the other sums likewise, the gradient's norm and the rates.

        micro_batches: those of all processes, of which each computes its share. How they are cut and how many processes
        there are changes nothing but the time. An update whose loss or gradient is not finite, or
        whose gradient is longer than `skip_norm`, is skipped but counts as a step, since its batch would come again.
        Raises DirlError where more than `max_skipped` in a row would be.
        """
        rates = self.set_learning_rates()
        self.model.train()
        share = self.share(micro_batches)
        totals: list[Sums] = []
        with self.times("backpropagation"), self.stoppable():
            for i, (rows, counts) in enumerate(share):
                is_last = i + 1 == len(share)
                # Reducing once, after the last micro-batch, saves traffic. Not with FSDP2: gradients that are reduced
                # to shards each time take less memory than full ones that wait.
                waits = not (is_last or self.accelerator.is_fsdp2)
                with self.accelerator.no_sync(self.model) if waits else nullcontext():
                    sums = self.sums(rows, loss, counts / normalizer)
                    # Data parallelism takes the mean over processes; the sum is meant, also of the parts of a gradient
                    # that come of the slices of a row.
                    self.accelerator.backward(sums["loss"] * self.accelerator.num_processes)
                totals.append({name: value.detach() for name, value in sums.items()})
            metrics = self.reduce(totals)

        with self.times("optimizer"):
            # Not Accelerate's, which looks for the model among all that it has by comparing tensors, and shards fail.
            norm = float(full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)))
            skip = not (math.isfinite(metrics["loss"]) and norm < self.skip_norm)  # the same in every process
            self.skipped = self.skipped + 1 if skip else 0
            if self.skipped > self.max_skipped:
                raise self.too_many_skipped(metrics["loss"], norm)
            for optimizer in self.optimizers:
                if not skip:
                    optimizer.step()
                optimizer.zero_grad()

        if not skip and norm > 0 and any(rates.values()):
            self.updates_applied += 1
        self.steps_taken += 1
        return {**metrics, "grad_norm": norm, **rates, "skipped": float(skip)}

    @property
    def unwrapped(self) -> nn.Module:
        """The model without what data parallelism puts around it."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def counts(self) -> dict[str, int]:
        """What a checkpoint remembers of the steps so far."""
        return {"updates": self.steps_taken, "skipped": self.skipped, "updates_applied": self.updates_applied}

    def restore(self, counts: Mapping[str, int], step: int) -> None:
        """Go on from what `counts` was; checkpoints of earlier versions lack some, and `step` stands for them."""
        self.steps_taken = counts.get("updates", step)
        self.skipped = counts["skipped"]
        self.updates_applied = counts.get("updates_applied", self.steps_taken)

    def too_many_skipped(self, loss: float, norm: float) -> DirlError:
        """What ends a run whose updates are skipped more often in a row than `max_skipped` allows."""
        remedy = f"lower {self.rate} in a run with another out= that resumes from a checkpoint of this one"
        if math.isfinite(loss) and math.isfinite(norm):
            remedy = f"raise skip_norm={self.skip_norm:g}, which the gradient is longer than"
        return DirlError(
            f"the loss is {loss:.3g} and its gradient {norm:.3g} at step {self.steps_taken + 1},"
            f" number {self.skipped} in a row to be skipped: {remedy}, or raise max_skipped"
        )

    def require_update(self, remedy: str) -> None:
        """Raises DirlError that ends in `remedy` where the model is still what it began as."""
        if not self.updates_applied:
            raise DirlError(f"no step changed the model, so there is none to save: {remedy}")

    @torch.no_grad()
    def measure(self, micro_batches: MicroBatches, loss: Loss, normalizer: float) -> dict[str, float]:
        """What `step` would return as its sums, and `likeliest`, those that greedy decoding takes; learns nothing."""
        self.model.eval()
        with self.stoppable():
            totals = [self.sums(rows, loss, counts / normalizer) for rows, counts in self.share(micro_batches)]
        reshard(self.model)
        return self.reduce(totals)

    @torch.no_grad()
    def add_scores(self, micro_batches: MicroBatches, model: nn.Module, name: str) -> list[Rows | None]:
        """The micro-batches with a model's log-probs or values as `name`, by each process on its share of them."""
        accelerator = self.accelerator
        model.eval()
        with self.times("logprobs"):
            scores = {}
            with accelerator.autocast():
                for own_rows, _ in self.share(micro_batches):
                    scores[id(own_rows)] = model(own_rows.to(accelerator.device))[0]
            reshard(model)

            annotated: list[Rows | None] = []
            for rows in micro_batches:
                if rows is not None and id(rows) in scores:
                    rows = rows.with_extras(**{name: scores[id(rows)].to(rows.target_index.device)})
                annotated.append(rows)
        return annotated

    def cut(self, rows: Rows, micro_rows: int | None) -> list[Rows]:
        """Micro-batches of at most `micro_rows` rows, one for every group at least where the rows allow it."""
        return rows.split(self.rows_each(len(rows.token_ids), micro_rows))

    def rows_each(self, rows: int, micro_rows: int | None) -> int:
        """The rows of each micro-batch that `rows` of them are cut into; see `cut`."""
        rows_per_group = -(-rows // self.groups)  # rounded up
        return min(micro_rows or rows_per_group, rows_per_group)

    def share(self, micro_batches: MicroBatches) -> list[tuple[Rows, float]]:
        """This process's micro-batches with their weights, as many as every other process has."""
        return [(cast(Rows, micro_batches[i]), counts) for i, counts in self.turns(len(micro_batches))]

    def turns(self, micro_batches: int) -> list[tuple[int, float]]:
        """Which of some micro-batches this process computes, with their weights.

        Processes wait for each other in every backward, so that one with less to do repeats the first micro-batch with
        weight 0; the others weigh 1.
        """
        group = self.accelerator.process_index // self.context.size
        own = [(i, 1.0) for i in range(group, micro_batches, self.groups)]
        most = -(-micro_batches // self.groups)  # rounded up
        while len(own) < most:
            own.append((0, 0.0))
        return own

    def sums(self, rows: Rows, loss: Loss, scale: float) -> Sums:
        """The loss and its metrics of a micro-batch, times `scale`; `likeliest` besides where nothing is learned."""
        rows = rows.to(self.accelerator.device)
        with self.accelerator.autocast():
            scores = self.model(rows)  # (N,) each: log-probs, entropies and is_likeliest, or values alone
        sums = loss(rows, *scores)
        if not self.model.training:
            sums["likeliest"] = scores[2].sum()
        return {name: value * scale for name, value in sums.items()}

    def reduce(self, totals: Sequence[Sums]) -> dict[str, float]:
        """Each sum over all micro-batches of all processes."""
        names = list(totals[0])
        rows = []
        for sums in totals:
            rows.append(torch.stack([sums[name].float() for name in names]))
        own = torch.stack(rows).sum(0)  # (metrics,), one tensor so that processes meet once
        reduced = self.accelerator.reduce(own / self.context.size, "sum")  # all processes of a group have the same
        return dict(zip(names, reduced.tolist(), strict=True))

    def set_learning_rates(self) -> dict[str, float]:
        """Set what the schedule asks at this step; returns each optimizer's rate by the name of its metric.

        The first one's is `lr`, another's has its kind before it, such as `adamw_lr`.
        """
        factor = self.schedule(self.steps_taken)
        for optimizer, rates in zip(self.optimizers, self.full_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        return {name: rates[0] * factor for name, rates in zip(self.rate_names, self.full_rates, strict=True)}


def own(micro_batches: MicroBatches) -> Iterator[Rows]:
    """Those that this process has made."""
    return (rows for rows in micro_batches if rows is not None)


def of_each(micro_batches: MicroBatches, change: Callable[[Rows], Rows]) -> MicroBatches:
    """The micro-batches, those that this process has made as they are changed."""
    return [None if rows is None else change(rows) for rows in micro_batches]
