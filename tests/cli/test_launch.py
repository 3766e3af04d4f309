"""What may be launched together, and how Accelerate is told of it."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from dirl_cli.cli.processes import accelerate_options, check_launch
from dirl_cli.errors import DirlError


def settings(**chosen):
    defaults = {"launch": "auto", "gpus": 1, "nodes": 1, "node_rank": None, "main_address": None, "device": "auto"}
    return SimpleNamespace(**defaults | chosen)


@pytest.mark.parametrize(
    ("command", "chosen", "sentence"),
    [
        ("sft", {"launch": "single", "gpus": 2}, "launch=single is one process: leave gpus and nodes at 1"),
        ("sft", {"launch": "fsdp2"}, "launch=fsdp2 shares a model among processes: give gpus=2 or more"),
        ("rl", {"launch": "zero2"}, "launch=zero2 shares a model among processes: give gpus=2 or more"),
        ("eval", {"launch": "fsdp2", "gpus": 2}, "leave launch at auto for dirl eval"),
        ("dpo", {"gpus": 6, "context_parallel": 4}, "context_parallel=4 .* of which there are 6: give gpus=4, or a"),
        ("rl", {"nodes": 2, "node_rank": 1}, "give each machine its node_rank, 0 to 1, and the main_address"),
        ("rl", {"nodes": 2, "main_address": "a"}, "give each machine its node_rank, 0 to 1, and the main_address"),
        ("rl", {"nodes": 2, "node_rank": 2, "main_address": "a"}, "give each machine its node_rank, 0 to 1, and"),
    ],
)
def test_what_does_not_go_together_is_told(command, chosen, sentence):
    with pytest.raises(DirlError, match=sentence):
        check_launch(command, settings(**chosen))


def test_cpu_gloo_takes_the_cpu_where_there_are_gpus():
    cfg = settings(launch="cpu_gloo", gpus=2)
    check_launch("rl", cfg)
    assert cfg.device == "cpu"


def test_two_machines_find_each_other_at_the_first_ones_address():
    options = accelerate_options(settings(gpus=4, nodes=2, node_rank=1, main_address="node7:4000"))
    chosen = dict(pairwise(options))
    assert chosen["--num_processes"] == "8"
    assert [chosen[f"--{key}"] for key in ("num_machines", "machine_rank")] == ["2", "1"]
    assert [chosen[f"--main_process_{key}"] for key in ("ip", "port")] == ["node7", "4000"]
    usual = accelerate_options(settings(gpus=4, nodes=2, node_rank=0, main_address="node7"))
    assert usual[usual.index("--main_process_port") + 1] == "29500"
