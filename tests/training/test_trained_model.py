"""A run, and any of its checkpoints, in the place of a model."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from typer.testing import CliRunner

from dirl_cli import Decoding, load_sampler, score
from dirl_cli.cli import schema
from dirl_cli.cli.app import app
from dirl_cli.cli.build import build
from dirl_cli.cli.run_dir import model_of_run
from dirl_cli.commands import sft
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.models.load import DiffusionLM, SavedModel
from dirl_cli.training.shards import Shard, write_shards
from tests.helpers.small import paid_by_the_letter

DATA = ("data.train=40", "data.held_out=4", "data.test=4", "batch_size=8", "eval_problems=0", "device=cpu")
SMALL = ("+model.hidden_size=32", "+model.num_hidden_layers=1", "+model.intermediate_size=32")
KEPT = ("steps=4", "save_every=2", "keep_checkpoints=0", "optim.lr=1e-2")


def trained(out: Path, *words: str, model: dict[str, object] | None = None) -> Path:
    """A fine-tuning run of four steps with two checkpoints, by default of a small model."""
    schema.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("sft", [*DATA, *SMALL, *KEPT, *words])
    OmegaConf.resolve(cfg)
    cfg.model = model or cfg.model
    (out / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    sft.run(cfg, out)
    return out


@pytest.fixture(scope="module", params=["none", "lora"])
def run(request, tmp_path_factory) -> Path:
    """What is in its checkpoints is the whole model, or factors beside it alone."""
    return trained(tmp_path_factory.mktemp("run"), f"peft={request.param}")


def load(path: Path, **settings: object) -> DiffusionLM:
    model = {"_target_": "dirl_cli.models.load.SavedModel", "name": "mine", "path": str(path), **settings}
    cfg = OmegaConf.create({"model": model_of_run(model)})
    return build(cfg.model).load("float32", "cpu")


def assert_same(one: DiffusionLM, other: DiffusionLM) -> None:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert (one.block_size, one.stop_token_ids) == (other.block_size, other.stop_token_ids)


def test_the_last_checkpoint_and_the_run_are_the_model_that_the_run_left(run):
    left = SavedModel("left", str(run / "model")).load("float32", "cpu")
    assert_same(load(run / "checkpoints/step-000004"), left)
    assert_same(load(run), left)


def test_python_takes_a_run_or_a_checkpoint_as_the_command_line_does(run, tmp_path):
    left = load_sampler(run / "model", device="cpu")
    for path in (run, run / "checkpoints/step-000004"):
        assert_same(load_sampler(path, device="cpu").lm, left.lm)
    ((answer,),) = left.sample([[5, 6]], 1, Decoding(max_new_tokens=4))
    assert score(run, [answer]) == score(run / "model", [answer])
    (tmp_path / "config.yaml").write_text("name: unfinished")
    with pytest.raises(DirlError, match="holds a run that has left no model"):
        load_sampler(tmp_path)


def test_an_earlier_checkpoint_is_the_model_of_its_step_and_all_of_it_can_be_trained(run):
    earlier, last = (load(run / f"checkpoints/step-00000{step}") for step in (2, 4))
    name = next(name for name, _ in last.model.named_parameters() if name.endswith("q_proj.weight"))
    assert not torch.equal(earlier.model.get_parameter(name), last.model.get_parameter(name))
    assert all(parameter.requires_grad for parameter in earlier.model.parameters())
    assert load(run / "checkpoints/step-000002", block_size=8).block_size == 8


def test_a_checkpoint_in_shards_is_a_model_too(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step-000004"
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    for i, half in enumerate((slice(0, 10), slice(10, None)), start=1):
        parts = {
            name: Shard(tensor[half], (half.start, *[0] * (tensor.ndim - 1)), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }
        write_shards(checkpoint / f"model-0000{i}-of-00002.safetensors", parts)
    assert_same(load(checkpoint), load(run))


def test_what_is_no_model_yet_is_told_with_what_to_give_instead(run, tmp_path):
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("model"))
    last = re.escape(f"model={unfinished}/checkpoints/step-000004")
    with pytest.raises(
        DirlError, match=f"run holds a run that has left no model: give its last checkpoint, {last}, or"
    ):
        load(unfinished)
    shutil.copytree(unfinished / "checkpoints/step-000004", tmp_path / "alone/step-000004")
    with pytest.raises(DirlError, match="is a checkpoint without its run: put it back into RUN/checkpoints"):
        load(tmp_path / "alone/step-000004")
    with pytest.raises(DirlError, match=r"has the mask token of its run: leave model\.mask_token_id out"):
        load(unfinished / "checkpoints/step-000004", mask_token_id=3)
    (unfinished / "checkpoints/step-000004/model.safetensors").write_bytes(b"cut")
    with pytest.raises(DirlError, match=r"step-000004 cannot be read .*: give another checkpoint of the run"):
        load(unfinished / "checkpoints/step-000004")
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(DirlError, match="it has no checkpoint yet, so let it go on to its end"):
        load(unfinished)


def test_what_a_run_with_an_adapter_leaves_goes_with_the_checkpoint_it_began_with(run, tmp_path):
    step = run / "checkpoints/step-000002"
    beside = trained(tmp_path, "peft=lora", model=model_of_run({"name": "mine", "path": str(step)}))
    assert_same(load(step, adapter=str(beside / "adapter")), load(beside))


@pytest.mark.timeout(300)
def test_every_command_takes_a_run_or_a_checkpoint_for_its_model(here: Path, tmp_path: Path) -> None:
    (here / "first").mkdir()
    trained(here / "first")
    step = "model=first/checkpoints/step-000002"
    asked = ("decoding.max_new_tokens=4", "device=cpu")
    commands = (
        ("eval", step, "limit=2", "samples=2", "out=asked", *asked),
        ("eval", "model=first", "limit=2", "samples=2", "out=asked-run", *asked),
        ("generate", step, "prompt=hello", "out=told", *asked),
        ("sft", step, *DATA, "steps=1", "out=tuned"),
        (
            "rl",
            step,
            *DATA[:3],
            *asked,
            "steps=1",
            "eval_problems=0",
            "rl.problems=1",
            "rl.group_size=2",
            "rl.filter=none",
            paid_by_the_letter(here),
            "out=rewarded",
        ),
    )
    for words in commands:
        result = CliRunner().invoke(app, words, env={"HYDRA_FULL_ERROR": "0"})
        assert result.exit_code == 0, (words, result.stderr, result.exception)
    card = json.loads((here / "asked/eval_card.json").read_text())
    assert card["model"]["base"]["name"] == "tiny" and card["model"]["path"].endswith("step-000002")
    assert OmegaConf.load(here / "asked-run/config.yaml").model.path == "first/model"
    for out in ("tuned", "rewarded"):
        assert_same(load(here / out / "checkpoints/step-000001"), load(here / out))
