import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dirl_cli.diffusion.layout import Rows
from dirl_cli.errors import DirlError
from dirl_cli.training.trainer import Sums, Trainer
from tests.helpers.processes import run_together

VOCABULARY = 6


class Bigram(nn.Module):
    """Predicts a token from the token that stands in its place, by a table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = self.table(rows.at_targets(rows.token_ids)).log_softmax(-1)
        of_target = logprobs.gather(-1, rows.targets[:, None]).squeeze(-1)
        return of_target, -(logprobs.exp() * logprobs).sum(-1), of_target == logprobs.amax(-1)


def rows_of(n: int) -> Rows:
    """`n` rows of four tokens whose second and third are scored, with uneven weights."""
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(VOCABULARY, (n, 4), generator=generator)
    where = torch.tensor([4 * row + column for row in range(n) for column in (1, 2)])
    return Rows(
        token_ids=token_ids,
        strip=torch.arange(n)[:, None].expand(n, 4),
        sequence=torch.zeros(n, 4, dtype=torch.long),
        position=torch.arange(4).expand(n, 4),
        view=torch.zeros(n, 4, dtype=torch.long),
        target_index=where,
        shifted_index=where - 1,
        targets=torch.randint(VOCABULARY, (2 * n,), generator=generator),
        weight=torch.rand(2 * n, generator=generator),
        block_size=4,
    )


def weighted(rows: Rows, logprobs: Tensor, entropy: Tensor, _: Tensor) -> Sums:
    return {"loss": -(rows.weight * logprobs).sum(), "entropy": entropy.sum()}


def trainer(clip_norm: float = 1e9, lr: float = 0.1, accelerator: Accelerator | None = None) -> Trainer:
    scorer = Bigram()
    optimizer = torch.optim.SGD(scorer.parameters(), lr=lr)
    return Trainer(accelerator or Accelerator(cpu=True), scorer, [optimizer], lambda step: 1.0, clip_norm)


def table(one: Trainer) -> Tensor:
    return one.accelerator.unwrap_model(one.model).table.weight.detach()


def test_a_step_is_plain_gradient_descent_on_the_sum_over_the_normalizer():
    by_hand = Bigram()
    rows = rows_of(5)
    logprobs, *_ = by_hand(rows)
    loss = -(rows.weight * logprobs).sum() / 7
    loss.backward()
    one = trainer()
    metrics = one.step([rows], weighted, normalizer=7)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(by_hand.table.weight.grad.norm().item(), rel=1e-6)
    torch.testing.assert_close(table(one), by_hand.table.weight.detach() - 0.1 * by_hand.table.weight.grad)


@pytest.mark.parametrize("rows_each", [1, 2, 3])
def test_how_a_batch_is_cut_into_micro_batches_changes_nothing(rows_each):
    whole, cut = trainer(), trainer()
    rows = rows_of(5)
    for _ in range(3):
        expected = whole.step([rows], weighted, normalizer=7)
        found = cut.step(rows.split(rows_each), weighted, normalizer=7)
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(table(cut), table(whole), rtol=1e-6, atol=1e-7)


def test_a_long_gradient_is_clipped_and_reported_as_it_was():
    start, one = Bigram().table.weight.detach(), trainer(clip_norm=0.01, lr=1.0)
    metrics = one.step([rows_of(5)], weighted, normalizer=1)
    assert metrics["grad_norm"] > 0.01
    assert (table(one) - start).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_schedule_sets_every_rate_from_the_number_of_steps_taken():
    one = trainer(lr=0.4)
    one.schedule = lambda step: [1.0, 0.5, 0.25][step]
    rates = [one.step([rows_of(1)], weighted, 1)["lr"] for _ in range(3)]
    assert rates == pytest.approx([0.4, 0.2, 0.1])
    one.steps_taken = 1
    assert one.step([rows_of(1)], weighted, 1)["lr"] == pytest.approx(0.2)


def test_each_optimizers_rate_is_told_and_any_of_them_moves_the_model():
    model, other = Bigram(), nn.Linear(1, 1)
    optimizers = [torch.optim.SGD(other.parameters(), lr=0.4), torch.optim.AdamW(model.parameters(), lr=0.2)]
    one = Trainer(Accelerator(cpu=True), model, optimizers, lambda step: 0.5, clip_norm=1e9)
    metrics = one.step([rows_of(5)], weighted, 1)
    assert (metrics["lr"], metrics["adamw_lr"], one.updates_applied) == (0.2, 0.1, 1)
    one.schedule = lambda step: 0.0
    metrics = one.step([rows_of(5)], weighted, 1)
    assert (metrics["lr"], metrics["adamw_lr"], one.updates_applied) == (0.0, 0.0, 1)


def test_a_loss_that_is_not_finite_stops_the_run_before_a_parameter_changes():
    one = trainer()
    before = table(one).clone()
    with pytest.raises(DirlError, match=r"the loss is nan .* at step 1, number 1 in a row"):
        one.step([rows_of(2)], lambda *_: {"loss": one.model.table.weight.sum() * float("nan")}, 1)
    assert torch.equal(table(one), before)


def test_updates_that_are_not_finite_or_too_long_are_skipped_and_counted():
    def spoiled(factor):
        return lambda *told: {name: value * factor for name, value in weighted(*told).items()}

    one = trainer()
    one.max_skipped, one.skip_norm = 2, 1e3
    before = table(one).clone()
    for step, factor in enumerate([float("nan"), 1e6], start=1):
        assert one.step([rows_of(2)], spoiled(factor), 1)["skipped"] == 1
        assert (one.skipped, one.steps_taken) == (step, step)
    assert torch.equal(table(one), before)
    assert one.step([rows_of(2)], weighted, 1)["skipped"] == 0
    assert one.skipped == 0 and not torch.equal(table(one), before)
    for _ in range(2):
        one.step([rows_of(2)], spoiled(float("inf")), 1)
    with pytest.raises(DirlError, match=r"at step 6, number 3 in a row to be skipped: lower optim.lr .* max_skipped"):
        one.step([rows_of(2)], spoiled(float("inf")), 1)


def test_measuring_gives_the_same_sums_and_learns_nothing():
    one = trainer()
    before = table(one).clone()
    measured = one.measure(rows_of(5).split(2), weighted, 7)
    assert torch.equal(table(one), before)
    stepped = one.step(rows_of(5).split(2), weighted, 7)
    guesses = before[rows_of(5).at_targets(rows_of(5).token_ids)].argmax(-1)
    assert measured.pop("likeliest") == pytest.approx(int((guesses == rows_of(5).targets).sum()) / 7)
    assert measured == pytest.approx({name: stepped[name] for name in measured}, rel=1e-6)


def several_steps(one: Trainer) -> list[float]:
    """Losses of three steps; five micro-batches, which two processes cannot share evenly."""
    return [one.step(rows_of(5).split(1), weighted, 7)["loss"] for _ in range(3)]


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path):
    one = trainer()
    losses = several_steps(one)
    words = [[str(tmp_path / f"{rank}.pt")] for rank in range(2)]
    run_together(__name__, words, seconds=60, ACCELERATE_USE_CPU="true")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(found["table"], table(one), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":  # one of the two processes
    shared = trainer(accelerator=Accelerator(cpu=True))
    assert shared.accelerator.num_processes == 2
    torch.save({"losses": several_steps(shared), "table": table(shared)}, Path(sys.argv[1]))
