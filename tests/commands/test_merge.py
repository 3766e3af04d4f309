"""LoRA adapters: merged on loading and by `dirl merge`, as PEFT itself merges them."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dirl_cli.cli import schema
from dirl_cli.commands.merge import run
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.models.load import SavedModel
from tests.helpers.small import MASK, random_lm, small_lm


@pytest.fixture(params=["untied", "tied", "moe"])
def base(request, tmp_path) -> Path:
    random_lm(request.param).save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def small(tmp_path) -> Path:
    small_lm().save(tmp_path / "small")
    return tmp_path / "small"


def adapter_of(base: Path, **options: object) -> Path:
    """An adapter of two projections of every layer, as training leaves one: all that was trained is random."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    chosen = {"target_modules": ["q_proj", "v_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for name, factor in adapted.named_parameters():
            if re.search("lora_|trainable_tokens|modules_to_save", name):
                factor.normal_(0, 0.3)
    adapted.save_pretrained(base.with_name("adapter"))
    return base.with_name("adapter")


def load(path: Path, adapter: Path | str | None = None) -> torch.nn.Module:
    return SavedModel("mine", str(path), adapter=adapter and str(adapter)).load("float32", "cpu").model


def merge(base: Path, adapter: Path | None, to: Path, *words: str) -> None:
    schema.register()
    given = ["model=path", f"model.path={base}", f"model.adapter={adapter or 'null'}", f"to={to}", *words]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("merge", given)
    OmegaConf.resolve(cfg)
    run(cfg, None)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 13)[None]).logits


# On loading


def test_a_merged_model_is_what_peft_makes_of_it_and_says_what_the_adapter_says(base):
    adapter = adapter_of(base)
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    unmerged = logits(beside)
    ours = load(base, adapter)
    assert torch.allclose(logits(ours), unmerged, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(load(base)), atol=1e-2)
    theirs = beside.merge_and_unload().state_dict()
    assert type(ours) is type(load(base)) and ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
    ],
    ids=lambda options: "+".join(options["target_modules"][1:] or list(options)[1:]) + " tied" * (len(options) - 1),
)
def test_an_adapter_of_a_head_that_is_tied_to_the_embedding_says_what_peft_says(tmp_path, recwarn, options):
    base, to = tmp_path / "base", tmp_path / "merged"
    random_lm("tied").save(base)
    adapter = adapter_of(base, **options)
    unmerged = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval())
    recwarn.clear()
    merge(base, adapter, to, "dtype=float32")
    assert not recwarn.list
    assert torch.allclose(logits(load(base, adapter)), unmerged, atol=1e-5)
    assert torch.allclose(logits(load(to)), unmerged, atol=1e-5)


def test_layers_that_were_trained_whole_come_along(small):
    adapter = adapter_of(small, modules_to_save=["lm_head"])
    weights = load_file(adapter / "adapter_model.safetensors")
    (head,) = (weights[name] for name in weights if name.endswith("lm_head.weight"))
    weights = {name: value + 1 if value is head else value for name, value in weights.items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    assert torch.equal(load(small, adapter).get_output_embeddings().weight, head + 1)


# By command


def test_the_command_writes_a_model_that_needs_no_adapter(base, capsys):
    adapter, to = adapter_of(base), base.with_name("merged")
    merge(base, adapter, to, "dtype=float32")
    assert capsys.readouterr().out == f"the merged model is in {to}: run `dirl eval model={to}`\n"
    assert torch.equal(logits(load(to)), logits(load(base, adapter)))
    config = json.loads((to / "config.json").read_text())
    assert (config["block_size"], config["mask_token_id"], config["torch_dtype"]) == (4, MASK, "float32")
    assert "adapter" in (to / "README.md").read_text()


def test_merged_weights_are_rounded_once_and_saved_as_published(small):
    adapter, to = adapter_of(small), small.with_name("merged")
    merge(small, adapter, to)
    exact = load(small, adapter).state_dict()
    assert all(
        torch.equal(value, exact[name].bfloat16()) for name, value in load_file(to / "model.safetensors").items()
    )


def test_the_command_refuses_what_is_no_merge(small, tmp_path):
    with pytest.raises(DirlError, match=r"there is nothing to merge: give an adapter with model.adapter=DIR"):
        merge(small, None, tmp_path / "new")
    before = sorted(small.iterdir())
    with pytest.raises(DirlError, match=f"{small} exists: give a new directory with to="):
        merge(small, adapter_of(small), small)
    assert sorted(small.iterdir()) == before


# What does not fit


def edited(adapter: Path, **changes: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_a_factor(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(sorted(weights.items())[1:]), adapter / "adapter_model.safetensors")


MISFITS: dict[str, Callable[[Path], object]] = {
    "has no adapter_config.json: give model.adapter the directory": lambda a: (a / "adapter_config.json").unlink(),
    "has no adapter_model.safetensors: give": lambda a: (a / "adapter_model.safetensors").unlink(),
    "cannot be merged .*header too small": lambda a: (a / "adapter_model.safetensors").write_bytes(b"cut"),
    "is damaged .*Expecting property name": lambda a: (a / "adapter_config.json").write_text("{"),
    "cannot be merged .*Target modules": lambda a: edited(a, target_modules=["c_attn"]),
    "cannot be merged .*size mismatch .*: give the model it was trained beside": lambda a: edited(a, r=8),
    "cannot be merged .*not in both, such as .*layers.0.*lora_A": without_a_factor,
}


@pytest.mark.parametrize("sentence", MISFITS)
def test_what_is_no_adapter_of_this_model_is_told_in_one_sentence(small, sentence):
    adapter = adapter_of(small)
    MISFITS[sentence](adapter)
    with pytest.raises(DirlError, match=sentence) as told:
        load(small, adapter)
    assert "\n" not in str(told.value) and str(adapter) in str(told.value)


def test_an_adapter_of_a_deeper_model_is_told_in_one_sentence(small):
    adapter = adapter_of(small)
    config = json.loads((small / "config.json").read_text())
    shallow = Path(shutil.copytree(small, small.with_name("shallow")))
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    tensors = load_file(small / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layers.1" not in name}
    save_file(kept, shallow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DirlError, match=r"cannot be merged into .*shallow .*such as .*layers.1"):
        load(shallow, adapter)


def test_an_adapter_that_is_not_here_is_told_with_the_remedy(small):
    with pytest.raises(DirlError, match=r"nowhere has no adapter_config.json"):
        load(small, "nowhere")
    with pytest.raises(DirlError, match="run `dirl download lab/adapter` first"):
        load(small, "lab/adapter")


def test_without_peft_the_sentence_says_what_to_install(small, monkeypatch):
    adapter = adapter_of(small)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DirlError, match=r"model.adapter needs the package peft .*pip install 'peft<"):
        load(small, adapter)
