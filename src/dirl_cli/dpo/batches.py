"""The batches of a preference run: batch n is the same whenever and wherever it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn

from dirl_cli.data.order import MixtureOrder, epochs, generator
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import BlockSpec, Views
from dirl_cli.dpo.pairs import Pair, Pairs
from dirl_cli.dpo.preference import Preference
from dirl_cli.rl.batch import answer_rows, trained_lengths
from dirl_cli.training.trainer import MicroBatches, Trainer


@dataclass(frozen=True)
class PairRows:
    """How pairs become packed rows, those of a pair in one row, however long.

    views: the states in which answers are scored. row_tokens: the most tokens of a row, unless one pair alone is
    longer. train_tail: whether the tokens after the stop token, which fill up its block, are scored too.
    """

    views: Views
    spec: BlockSpec
    pad_id: int
    row_tokens: int
    train_tail: bool

    def __call__(self, pairs: Sequence[Pair], *seed: int) -> Rows:
        """Packed rows of the pairs, what is random in their views drawn anew."""
        groups = [pair.answers for pair in pairs]
        lengths = trained_lengths(list(chain.from_iterable(groups)), self.train_tail)
        return answer_rows(groups, lengths, self.views, self.spec, self.pad_id, self.row_tokens, generator(*seed))


@dataclass(frozen=True)
class PairBatches:
    """Batch by step: the next `batch_size` pairs in their order. sources: the names of what they come from."""

    pairs: Sequence[Pairs]
    order: MixtureOrder
    batch_size: int
    rows: PairRows
    seed: int
    sources: Sequence[str] = ("",)

    def __getitem__(self, step: int) -> Rows:
        first = step * self.batch_size
        drawn = [self._pair(self.order[index]) for index in range(first, first + self.batch_size)]
        return self.rows(drawn, self.seed, step)

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each source has been gone through after so many steps, as metrics."""
        return epochs(self.order, self.sources, steps * self.batch_size)

    def _pair(self, number: int) -> Pair:
        """The pair of a number that counts through all sources."""
        for source in self.pairs:
            if number < len(source):
                return source[number]
            number -= len(source)
        raise IndexError


@dataclass(frozen=True)
class PairValidation:
    """Held-out pairs in views that stay the same, with what the reference makes of them."""

    micro_batches: MicroBatches
    num_pairs: int
    trainer: Trainer
    preference: Preference

    def measure(self) -> dict[str, float]:
        """The sums of `Preference.loss` on average, such as `validation_loss` and `validation_reward_accuracy`."""
        sums = self.trainer.measure(self.micro_batches, self.preference.loss, self.num_pairs)
        sums.pop("likeliest")
        return {f"validation_{name}": value for name, value in sums.items()}


def hold_out_pairs(
    pairs: Sequence[Pair],
    rows: PairRows,
    reference: nn.Module,
    trainer: Trainer,
    preference: Preference,
    micro_rows: int | None,
    seed: int,
) -> PairValidation:
    """Lay out held-out pairs, of which there is at least one, and have the reference score them once and for all."""
    micro_batches = trainer.cut(rows(pairs, seed), micro_rows)
    return PairValidation(trainer.add_scores(micro_batches, reference, "ref_logprobs"), len(pairs), trainer, preference)
