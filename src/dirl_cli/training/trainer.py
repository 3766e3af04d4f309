"""One optimizer step, the same for every objective and any number of processes."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dirl_cli.diffusion.layout import Rows
from dirl_cli.errors import DirlError
from dirl_cli.training.parallel import reshard


class PhaseTimes:
    """Seconds spent in named phases: `total` since the start, and what `take` gives since it was last called.

    A run takes them with each line of its metrics, which so holds what came since the line before it.
    """

    def __init__(self) -> None:
        self.total: dict[str, float] = defaultdict(float)
        self._new: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.total[phase] += seconds
            self._new[phase] += seconds

    def take(self) -> dict[str, float]:
        """As metrics, such as `seconds/optimizer`."""
        new, self._new = self._new, defaultdict(float)
        return {f"seconds/{phase}": seconds for phase, seconds in new.items()}


Sums = dict[str, Tensor]
Loss = Callable[[Rows, Tensor, Tensor], Sums]
"""From rows and their scored tokens' log-probs (N,) and entropies (N,) to `loss` and any metrics, each summed."""


class Trainer:
    """Takes optimizer steps on packed rows.

    The parameters stay in float32 and bf16 is autocast around the forward (the accelerator's `mixed_precision`),
    so that small updates are not rounded away, whether whole or in shards. `schedule` gives
    the factor on every learning rate at a step, `stoppable` surrounds what may be given up by raising.
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
    ) -> None:
        self.accelerator = accelerator
        self.model, *prepared = accelerator.prepare(model, *optimizers)
        self.optimizers: list[torch.optim.Optimizer] = [one.optimizer for one in prepared]
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.full_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.rate_names = ["lr", *(f"{type(other).__name__.lower()}_lr" for other in optimizers[1:])]
        self.max_skipped, self.skip_norm = max_skipped, skip_norm
        self.stoppable = stoppable
        self.skipped = 0  # updates in a row
        self.steps_taken = 0
        self.updates_applied = 0  # that moved the parameters: not skipped, and neither gradient nor rate is 0
        self.times = PhaseTimes()

    def step(self, micro_batches: Sequence[Rows], loss: Loss, normalizer: float) -> dict[str, float]:
        """Descend on Σ loss ÷ `normalizer`; returns that, the other sums likewise, the gradient's norm and the rates.

        micro_batches: those of all processes, the same list on each, which computes its share. How they are cut and
        how many processes there are changes nothing but the time. An update whose loss or gradient is not finite, or
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
                # a shard of every gradient takes less than whole ones that wait for the last micro-batch
                waits = not (is_last or self.accelerator.is_fsdp2)
                with self.accelerator.no_sync(self.model) if waits else nullcontext():
                    sums = self.sums(rows, loss, counts / normalizer)
                    # data parallelism takes the mean over processes; the sum is meant
                    self.accelerator.backward(sums["loss"] * self.accelerator.num_processes)
                totals.append({name: value.detach() for name, value in sums.items()})
            metrics = self.reduce(totals)
        with self.times("optimizer"):
            norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm))
            skip = not (math.isfinite(metrics["loss"]) and norm < self.skip_norm)  # the same in every process
            self.skipped = self.skipped + 1 if skip else 0
            if self.skipped > self.max_skipped:
                remedy = "lower optim.lr in a run with another out= that resumes from a checkpoint of this one"
                if math.isfinite(metrics["loss"]) and math.isfinite(norm):
                    remedy = f"raise skip_norm={self.skip_norm:g}, which the gradient is longer than"
                raise DirlError(
                    f"the loss is {metrics['loss']:.3g} and its gradient {norm:.3g} at step {self.steps_taken + 1},"
                    f" number {self.skipped} in a row to be skipped: {remedy}, or raise max_skipped"
                )
            for optimizer in self.optimizers:
                if not skip:
                    optimizer.step()
                optimizer.zero_grad()
        if not skip and norm > 0 and any(rates.values()):
            self.updates_applied += 1
        self.steps_taken += 1
        return {**metrics, "grad_norm": norm, **rates, "skipped": float(skip)}

    def require_update(self, remedy: str) -> None:
        """Raises DirlError that ends in `remedy` where the model is still what it began as."""
        if not self.updates_applied:
            raise DirlError(f"no step changed the model, so there is none to save: {remedy}")

    @torch.no_grad()
    def measure(self, micro_batches: Sequence[Rows], loss: Loss, normalizer: float) -> dict[str, float]:
        """What `step` would return as its sums, and `likeliest`, those that greedy decoding takes; learns nothing."""
        self.model.eval()
        with self.stoppable():
            totals = [self.sums(rows, loss, counts / normalizer) for rows, counts in self.share(micro_batches)]
        reshard(self.model)
        return self.reduce(totals)

    def cut(self, rows: Rows, micro_rows: int | None) -> list[Rows]:
        """Micro-batches of at most `micro_rows` rows, one for every process at least where the rows allow it."""
        each = -(-len(rows.token_ids) // self.accelerator.num_processes)
        return rows.split(min(micro_rows or each, each))

    def share(self, micro_batches: Sequence[Rows]) -> list[tuple[Rows, float]]:
        """This process's micro-batches, as many as every other's; those that only keep step count 0, the others 1."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        own = [(rows, 1.0) for rows in micro_batches[rank::world]]
        return own + [(micro_batches[0], 0.0)] * (-(-len(micro_batches) // world) - len(own))

    def sums(self, rows: Rows, loss: Loss, scale: float) -> Sums:
        rows = rows.to(self.accelerator.device)
        with self.accelerator.autocast():
            logprobs, entropy, likeliest = self.model(rows)
        found = loss(rows, logprobs, entropy)
        if not self.model.training:
            found["likeliest"] = likeliest.sum()
        return {name: value * scale for name, value in found.items()}

    def reduce(self, totals: Sequence[Sums]) -> dict[str, float]:
        """Each sum over all micro-batches of all processes."""
        stacked = torch.stack([torch.stack([sums[name].float() for name in totals[0]]) for sums in totals]).sum(0)
        reduced = self.accelerator.reduce(stacked, "sum")
        return dict(zip(totals[0], reduced.tolist(), strict=True))

    def set_learning_rates(self) -> dict[str, float]:
        """Set what the schedule asks at this step; returns each optimizer's rate by the name of its metric.

        The first one's is `lr`, another's has its kind before it, such as `adamw_lr`.
        """
        factor = self.schedule(self.steps_taken)
        for optimizer, rates in zip(self.optimizers, self.full_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        return {name: rates[0] * factor for name, rates in zip(self.rate_names, self.full_rates, strict=True)}
