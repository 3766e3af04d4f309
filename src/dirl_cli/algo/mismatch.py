"""How far the sampler's log-probs are from the trainer's, for the same tokens under the same weights."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dirl_cli.algo.objective import Objective, k3, ratio_of
from dirl_cli.diffusion.layout import Rows


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
