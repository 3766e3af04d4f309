"""Compiled layers and what they keep for backpropagation: the same gradients, attention once, one code for all."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from dirl_cli.commands import sft, start
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.masking import PerBlock, example
from dirl_cli.errors import DirlError
from dirl_cli.models.attention import hidden_states
from dirl_cli.models.experts import GROUPED
from dirl_cli.models.load import fitting_attention
from dirl_cli.models.low_precision import inference_model
from dirl_cli.models.peft import LoraFinetune
from dirl_cli.ranges import Checkpointing, Compiling, require
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.sft.batches import Noise
from dirl_cli.training.layers import ATTENTION, checkpoint_layers, compile_layers, is_compiled, pick_compile
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.types import Decoding
from tests.helpers.rl_runs import config as rl_config
from tests.helpers.rl_runs import lines, run, save_sharp_model
from tests.helpers.small import MASK, PAD, random_lm, small_lm
from tests.training.test_gradient_checkpointing import config

LAYERS = 2  # of `small_lm`


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def rows(length: int, n: int = 1) -> Rows:
    demonstrations = [example([2 + i % 40 for i in range(length)], [place >= 6 for place in range(length)], 4, PAD)] * n
    return Noise(PerBlock(), 4, MASK, PAD, row_tokens=2 * length).rows(demonstrations, 0)[0]


class Counted(TorchDispatchMode):
    """Counts how often attention is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls["attention"] += function in ATTENTION
        return function(*args, **(kwargs or {}))


def gradients(model, batch: Rows) -> dict[str, torch.Tensor]:
    """The gradient of the log-probs' sum for each parameter that learns."""
    model.zero_grad()
    scorer = LogprobModel(model)
    scorer.train()
    scorer(batch)[0].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-9, name


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 1), (True, 2), ("attention", 1)])
def test_attention_whose_output_is_kept_is_computed_once_and_all_else_twice(checkpointing, times):
    expected = gradients(small_lm().model, rows(20))
    model = small_lm().model
    checkpoint_layers(model, checkpointing)
    projections = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: projections.append(1))
    with Counted() as counted:
        found = gradients(model, rows(20))
    assert counted.calls["attention"] == times * LAYERS
    assert len(projections) == (2 if checkpointing else 1) * LAYERS
    assert_alike(found, expected)


def test_layers_and_lengths_share_one_code_and_the_gradients_are_the_same():
    expected, model = small_lm().model, small_lm().model
    names = list(model.state_dict())
    compile_layers(model, "aot_eager")
    for length in (20, 31, 64):
        assert_alike(gradients(model, rows(length)), gradients(expected, rows(length)))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, "attention"])
def test_compiled_layers_are_checkpointed(checkpointing):
    expected = gradients(small_lm().model, rows(20))
    model = small_lm().model
    checkpoint_layers(model, checkpointing)
    compile_layers(model, "aot_eager")
    gradients(model, rows(28))  # compiles
    with Counted() as counted:
        found = gradients(model, rows(20))
    assert counted.calls["attention"] == (LAYERS if checkpointing == "attention" else 2 * LAYERS)
    assert_alike(found, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_layers_have_adapters_and_bf16_around_weights_in_fp32():
    adapter = LoraFinetune(rank=4, alpha=8.0, dropout=0.0, targets=("q_proj", "down_proj"), seed=0, four_bit=False)
    found = []
    for compiles in (False, True):
        model = small_lm().model
        adapter.adapt(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        if compiles:
            compile_layers(model, "aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, rows(20)))
    assert_alike(found[1], found[0])
    assert counters["stats"]["unique_graphs"] >= 1


@pytest.mark.slow
def test_a_mixture_whose_experts_are_side_by_side_is_compiled_whole():
    expected, model = random_lm("moe").model, random_lm("moe").model
    for each in (expected, model):
        each.config._experts_implementation = GROUPED
    compile_layers(model, "aot_eager")
    for length in (40, 20):
        with torch.autocast("cpu", torch.bfloat16):  # the one dtype in which a graph may have products of experts
            assert_alike(gradients(model, rows(length)), gradients(expected, rows(length)))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@torch.no_grad()  # without gradients, which nothing has for FlexAttention on a CPU
def test_flex_attention_is_part_of_a_compiled_layer():
    expected = small_lm(head_dim=16).model
    model = small_lm(attention="flex_attention", head_dim=16).model
    compile_layers(model, "aot_eager")
    for length in (100, 200):  # of a row in a single tile there is another code
        batch = rows(length)
        torch.testing.assert_close(hidden_states(model, batch), hidden_states(expected, batch), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_what_samples_is_a_copy_that_is_not_compiled():
    lm = small_lm()
    decoding = Decoding(max_new_tokens=8)
    expected = NativeSampler(small_lm()).sample([[5, 6, 7]], 1, decoding)
    compile_layers(lm.model, "aot_eager")
    assert is_compiled(lm.model)
    assert not is_compiled(inference_model(lm.model))
    assert NativeSampler(lm).sample([[5, 6, 7]], 1, decoding) == expected
    assert not counters["stats"]


def test_auto_compiles_on_a_gpu_alone():
    assert pick_compile("auto", "cuda:1") and not pick_compile("auto", "cpu")
    assert pick_compile(True, "cpu") and not pick_compile(False, "cuda")


def test_a_gpus_small_heads_attend_by_a_dense_mask():
    config = small_lm(head_dim=8).model.config
    assert fitting_attention(config, "flex_attention", "cuda:0") == "sdpa"
    assert fitting_attention(config, "flex_attention", "cpu") == "flex_attention"
    config.head_dim = 16
    assert fitting_attention(config, "flex_attention", "cuda") == "flex_attention"


def test_only_words_that_mean_something_are_taken():
    for value in ("auto", True, False):
        require(value, Compiling, "compile")
    for value in (False, True, "attention"):
        require(value, Checkpointing, "gradient_checkpointing")
    with pytest.raises(DirlError, match="gradient_checkpointing=atention: did you mean attention"):
        require("atention", Checkpointing, "gradient_checkpointing")
    with pytest.raises(DirlError, match="compile=1: give one of auto, true, false"):
        require(1, Compiling, "compile")


@pytest.mark.slow
def test_a_run_that_compiles_says_so_and_how_long_it_took(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(start, "compile_layers", partial(compile_layers, backend="eager"))
    sft.run(config("compile=true", "gradient_checkpointing=attention"), tmp_path / "compiled")
    sft.run(config("compile=auto"), tmp_path / "plain")
    assert "compiling: the first steps take" in capsys.readouterr().out
    lines = []
    for name in ("compiled", "plain"):
        lines.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()])
    compiled, plain = lines
    assert sum(line.get("seconds/compilation", 0) for line in compiled) > 0
    assert not any("seconds/compilation" in line for line in plain)
    losses = [[line["loss"] for line in lines_of if "loss" in line] for lines_of in (compiled, plain)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_reference_and_a_critic_are_compiled_as_the_policy_is(tmp_path: Path, monkeypatch):
    compiled = []

    def compile_and_note(model) -> None:
        compiled.append(model)
        compile_layers(model, backend="eager")

    monkeypatch.setattr(start, "compile_layers", compile_and_note)
    model = save_sharp_model(tmp_path / "model")
    steps = []
    for name in ("false", "true"):
        words = ("algo=dipo", "algo.beta=0.1", "critic=model", "steps=2", f"compile={name}")
        run(rl_config(model, *words), tmp_path / name)
        steps.append(lines(tmp_path / name))
    assert len(compiled) == 3
    for plain, other in zip(*steps, strict=True):
        for metric in {"loss", "kl", "value_loss", "grad_norm"} & plain.keys():
            assert other[metric] == pytest.approx(plain[metric], rel=1e-4, abs=1e-6)
