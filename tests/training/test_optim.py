import pytest
import torch
from torch import nn

from dirl_cli.training.optim import AdamW, Constant, Cosine, Linear, Muon, layer_matrices, warmup_remark


class Net(nn.Module):
    """An embedding, a layer with a bias, a norm and an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layer(self.embed(ids))))


def names(net: nn.Module, parameters: list[torch.Tensor]) -> set[str]:
    return {name for name, p in net.named_parameters() if any(p is one for one in parameters)}


def test_adamw_decays_matrices_but_neither_norms_nor_biases():
    net = Net()
    [optimizer] = AdamW(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).build(net)
    decayed, others = optimizer.param_groups
    assert (
        names(net, decayed["params"]) == {"embed.weight", "layer.weight", "head.weight"}
        and decayed["weight_decay"] == 0.1
    )
    assert names(net, others["params"]) == {"layer.bias", "norm.weight", "norm.bias"} and others["weight_decay"] == 0


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest():
    net = Net()
    muon, adamw = Muon(0.02, 0.95, 4e-3, (0.9, 0.98), 1e-8, 0.0).build(net)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert names(net, muon.param_groups[0]["params"]) == {"layer.weight"}
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert names(net, rest) == {"embed.weight", "head.weight", "layer.bias", "norm.weight", "norm.bias"}


def test_frozen_parameters_are_left_to_no_optimizer():
    net = Net()
    net.embed.weight.requires_grad_(False)
    net.layer.weight.requires_grad_(False)
    optimizers = [*AdamW(1e-3, (0.9, 0.95), 1e-8, 0.1).build(net)]
    held = names(net, [p for o in optimizers for group in o.param_groups for p in group["params"]])
    assert held == {"head.weight", "layer.bias", "norm.weight", "norm.bias"}
    assert layer_matrices(net) == []


def test_muon_moves_a_matrix_by_about_its_rate_in_every_direction():
    net = Net()
    before = net.layer.weight.detach().clone()
    muon, _ = Muon(0.02, 0.95, 4e-3, (0.9, 0.98), 1e-8, 0.0).build(net)
    net(torch.arange(5)).square().sum().backward()
    muon.step()
    moved = torch.linalg.svdvals(before - net.layer.weight.detach())
    assert float(moved[0]) == pytest.approx(0.02, rel=0.3)


def test_the_warm_up_learns_from_its_first_step_and_ends_at_the_full_rate():
    factors = [Constant(warmup=4)(step, 10) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_warm_up_below_one_is_a_fraction_of_the_run():
    assert Constant(warmup=0.03)(0, 100) == pytest.approx(1 / 3)


def test_a_warm_up_that_is_longer_than_the_run_is_told():
    assert warmup_remark(Constant(10), 4) == (
        "schedule.warmup=10 is longer than the run: rates come to 40% of their full ones"
    )
    assert Constant(10)(3, 4) == 0.4
    assert warmup_remark(Linear(4, 0.0), 4) is warmup_remark(Cosine(0.5, 0.1), 4) is None


def test_no_warm_up_starts_at_the_full_rate():
    assert Constant(warmup=0)(0, 10) == 1.0


def test_linear_falls_evenly_to_its_floor_at_the_last_step():
    factors = [Linear(warmup=1, floor=0.2)(step, 5) for step in range(5)]
    assert factors == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_way_in_the_middle_and_at_its_floor_at_the_end():
    schedule = Cosine(warmup=0, floor=0.1)
    assert schedule(4, 10) == pytest.approx(0.55)
    assert schedule(9, 10) == pytest.approx(0.1)
    assert schedule(20, 10) == pytest.approx(0.1)
